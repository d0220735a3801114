"""Shards -> groups -> batches: the stream's order, the random choices of a sample, and its tensors."""
