"""The kernels for other programs: as torch.library operators, and inside transformers."""
