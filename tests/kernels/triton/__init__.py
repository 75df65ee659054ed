"""The Triton kernels: `interpreted_*.py` run in the interpreter, started by `test_interpreted.py`."""
