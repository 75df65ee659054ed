"""C++ kernels for the CPU: weights used where the checkpoint is mapped, activations in float32, which products
with MXFP4 weights round to 16-bit integers."""

from __future__ import annotations

from moe_surgery.kernels.native.backend import NativeBackend, availability

__all__ = ["NativeBackend", "availability"]
