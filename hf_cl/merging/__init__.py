"""Merge rules: one pure function a file, over mappings of tensors; its name is its file's name."""
