"""Checkpoints of the Hugging Face kind on disk, larger than memory: read by slices, written as a stream."""
