"""C++ kernels for the CPU: weights are read where the checkpoint is mapped; activations are float32, rounded to
16-bit integers in products with MXFP4 weights."""

from __future__ import annotations

from moe_surgery.kernels.native.backend import NativeBackend, availability

__all__ = ["NativeBackend", "availability"]
