"""Pruning GGUF files as they lie on disk: slices of tensors, and the few keys of the metadata that count experts."""
