"""Number formats of checkpoint tensors: exact conversions on numpy arrays, without torch."""
