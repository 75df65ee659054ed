"""The decode step's kernels: `device_*.py` run on a GPU, or in the interpreter by `test_interpreted.py`."""
