"""Repairs what a cut changed: small tensors of a pruned model, trained to follow the full one."""
