"""Triton kernels for CUDA devices; README.md beside this file says what they do and what is tested."""

from __future__ import annotations

import importlib.util

import torch

from moe_surgery.kernels.triton.backend import TritonBackend

__all__ = ["TritonBackend", "availability"]


def availability() -> str | None:
    """Why the Triton backend cannot run here, in a few words, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from moe_surgery.kernels.triton.launch import interpreting

    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    if torch.version.hip is not None:
        return "it is tested for NVIDIA devices only"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None
