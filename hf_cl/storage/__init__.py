"""The run folder: files a finished task leaves, whole or not at all."""
