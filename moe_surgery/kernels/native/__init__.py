"""C++ kernels for the CPU: weights used where the checkpoint is mapped, activations in float32."""

from __future__ import annotations

from moe_surgery.kernels.native.backend import NativeBackend, availability

__all__ = ["NativeBackend", "availability"]
