"""The operations of a decoder layer behind one interface, and the choice of the backend that runs them."""

from __future__ import annotations

import logging
from functools import lru_cache

import torch

from moe_surgery.errors import UsageError
from moe_surgery.formats.native import native_disabled
from moe_surgery.kernels.interface import Backend
from moe_surgery.kernels.invariant import SUFFIX, InvariantBackend
from moe_surgery.kernels.reference import ReferenceBackend

__all__ = ["BACKENDS", "Backend", "backend_states", "select_backend"]

log = logging.getLogger("moe_surgery")

BACKENDS = ("reference", "native", "triton", "reference-invariant", "triton-invariant")


def select_backend(device: torch.device, name: str | None = None) -> Backend:
    """The backend called `name`, or the best one for `device`: triton on CUDA, native on the CPU, where
    they work, else reference. The invariant ones process one token at a time (see `InvariantBackend`).

    Where the default falls back to reference, the reason is logged to `moe_surgery` once per process, as a
    warning unless MOE_SURGERY_NATIVE=0 is set. Raises UsageError for an unknown name and for a backend that
    cannot run here; a backend given by name is never replaced by another.
    """
    if name is not None and name not in BACKENDS:
        raise UsageError(f"`backend` {name}: unknown; known: {', '.join(BACKENDS)}")
    if name is not None and name.endswith(SUFFIX):
        return InvariantBackend(select_backend(device, name.removesuffix(SUFFIX)))
    if name == "native" or (name is None and device.type == "cpu" and _native_reason() is None):
        if device.type != "cpu":
            raise UsageError(f"`backend` native: runs on the CPU, not on {device}")
        from moe_surgery.kernels.native import NativeBackend

        return NativeBackend()
    if name == "triton" or (name is None and device.type == "cuda" and _triton_reason() is None):
        if (reason := _triton_reason()) is not None:
            raise UsageError(f"`backend` triton: {reason}")
        from moe_surgery.kernels.triton import TritonBackend
        from moe_surgery.kernels.triton.launch import interpreting

        if device.type != "cuda" and not interpreting():
            raise UsageError(f"`backend` triton: runs on CUDA devices, not on {device}")
        return TritonBackend()
    if name is None and (missing := _missing(device)) is not None:
        _log_missing(device.type, *missing)
    return ReferenceBackend()


def _missing(device: torch.device) -> tuple[str, str] | None:
    """The fast backend for `device` and why it does not work here, or None."""
    reasons = {"cpu": ("native", _native_reason), "cuda": ("triton", _triton_reason)}
    if device.type not in reasons:
        return None
    name, reason = reasons[device.type]
    why = reason()
    return None if why is None else (name, why)


@lru_cache(maxsize=8)
def _log_missing(device_type: str, name: str, why: str) -> None:
    log.log(
        logging.INFO if native_disabled() and name == "native" else logging.WARNING,
        "backend reference (plain PyTorch, slower) on %s, because %s does not work: %s; "
        "`backend` reference chooses it without this note",
        device_type,
        name,
        why,
    )


def backend_states() -> dict[str, str]:
    """Backend -> "yes" and its details, or "no" and the reason."""
    native, triton = _native_reason(), _triton_reason()
    return {
        "reference": "yes",
        "native": f"yes: {_native_details()}" if native is None else f"no: {native}",
        "triton": "yes" if triton is None else f"no: {triton}",
        "reference-invariant": f"yes: {_INVARIANT}",
        "triton-invariant": f"yes: {_INVARIANT}" if triton is None else f"no: {triton}",
    }


_INVARIANT = "one token at a time, so that results do not depend on the rest of the batch (native's never do)"


def _native_details() -> str:
    from moe_surgery.kernels.native import NativeBackend

    backend = NativeBackend()
    return (
        f"{backend.isa}, threads: {backend.threads}; the default on the CPU; float32, but products with MXFP4 "
        "weights round activations to 16-bit integers"
        + (
            ", and steps of 32 tokens and more round those of other products to sums of two BF16 values"
            if backend.has_tiles
            else ""
        )
    )


def _native_reason() -> str | None:
    from moe_surgery.kernels.native import availability

    return availability()


def _triton_reason() -> str | None:
    from moe_surgery.kernels.triton import availability

    return availability()
