"""Who owns an entry, and the digests that prove nobody moved it. torch only."""
