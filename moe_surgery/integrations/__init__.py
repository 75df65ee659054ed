"""Other people's programs run on this package's kernels: torch.library operators, transformers."""
