"""Runs a checkpoint: weights mapped from the shards, attention, KV cache, layers, sampling, generation."""
