"""The operations of a decoder layer behind one interface, and the choice of who carries them out."""

from __future__ import annotations

import torch

from moe_surgery.errors import UsageError
from moe_surgery.kernels.interface import Backend
from moe_surgery.kernels.invariant import SUFFIX, InvariantBackend
from moe_surgery.kernels.reference import ReferenceBackend

__all__ = ["BACKENDS", "Backend", "backend_states", "select_backend"]

BACKENDS = ("reference", "native", "triton", "reference-invariant", "triton-invariant")


def select_backend(device: torch.device, name: str | None = None) -> Backend:
    """The backend called `name`, or the best one for `device`: triton on CUDA, native on the CPU, where
    they work, else reference. Those called invariant do one token at a time (see `InvariantBackend`).

    Raises UsageError for an unknown name and for a backend that cannot run here; one that was asked
    for is never replaced by another.
    """
    if name is not None and name not in BACKENDS:
        raise UsageError(f"--backend {name}: unknown; known: {', '.join(BACKENDS)}")
    if name is not None and name.endswith(SUFFIX):
        return InvariantBackend(select_backend(device, name.removesuffix(SUFFIX)))
    if name == "native" or (name is None and device.type == "cpu" and _native_reason() is None):
        if device.type != "cpu":
            raise UsageError(f"--backend native: runs on the CPU, not on {device}")
        from moe_surgery.kernels.native import NativeBackend

        return NativeBackend()
    if name == "triton" or (name is None and device.type == "cuda" and _triton_reason() is None):
        if (reason := _triton_reason()) is not None:
            raise UsageError(f"--backend triton: {reason}")
        from moe_surgery.kernels.triton import TritonBackend
        from moe_surgery.kernels.triton.launch import interpreting

        if device.type != "cuda" and not interpreting():
            raise UsageError(f"--backend triton: runs on CUDA devices, not on {device}")
        return TritonBackend()
    return ReferenceBackend()


def backend_states() -> dict[str, str]:
    """Backend -> "yes" and when it is chosen, or why it does not work here."""
    native, triton = _native_reason(), _triton_reason()
    return {
        "reference": "yes",
        "native": f"yes: {_native_details()}" if native is None else f"no: {native}",
        "triton": "yes" if triton is None else f"no: {triton}",
        "reference-invariant": f"yes: {_INVARIANT}",
        "triton-invariant": f"yes: {_INVARIANT}" if triton is None else f"no: {triton}",
    }


_INVARIANT = "one token at a time, so that no result depends on the tokens beside it (with native none does)"


def _native_details() -> str:
    from moe_surgery.kernels.native import NativeBackend

    backend = NativeBackend()
    return f"{backend.isa}, threads: {backend.threads}; chosen on the CPU unless --backend says otherwise"


def _native_reason() -> str | None:
    from moe_surgery.kernels.native import availability

    return availability()


def _triton_reason() -> str | None:
    from moe_surgery.kernels.triton import availability

    return availability()
