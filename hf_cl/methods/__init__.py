"""One file a method: its options, and `build`, which wraps a base to learn a stream that way."""
