"""Merging checkpoints on disk by the rules of `hf_cl.merging`; see `hf_cl.disk_merge.merge`."""
