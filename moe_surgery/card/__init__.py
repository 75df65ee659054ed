"""The model card of a pruned checkpoint."""
