"""The MoE operations (route, experts) behind one interface, and the choice of who carries them out."""

from __future__ import annotations

import torch

from moe_surgery.errors import UsageError
from moe_surgery.kernels.interface import Backend
from moe_surgery.kernels.reference import ReferenceBackend

__all__ = ["BACKENDS", "Backend", "select_backend"]

BACKENDS = ("reference",)


def select_backend(device: torch.device, name: str | None = None) -> Backend:
    """The backend called `name`, or the best one for `device`.

    Raises UsageError for an unknown name; a backend that was asked for is never replaced by another.
    """
    if name is not None and name not in BACKENDS:
        raise UsageError(f"--backend {name}: unknown; known: {', '.join(BACKENDS)}")
    return ReferenceBackend()
