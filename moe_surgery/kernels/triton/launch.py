"""A kernel launch as a value: it can be run, or compiled ahead of time for a device that is not here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

__all__ = ["COUNTERS", "Launch", "interpreting", "next_power_of_two", "partial_size", "workspace"]

# The most output tiles of a split reduction.
COUNTERS = 1 << 16


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel with its grid and every argument by name, constexprs included."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages)


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1 when it was first imported)."""
    return bool(triton.knobs.runtime.interpret)


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()


_counters: dict[tuple[str, int], Tensor] = {}


def workspace(device: torch.device, values: int) -> tuple[Tensor, Tensor]:
    """Workspace in which programs combine their results: (partial, counters).

    partial [values] float32, at least one, is uninitialised. counters [COUNTERS] int32 are zero, and every
    launch leaves them zero; they belong to one stream, because concurrent launches would corrupt them.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (str(device), stream)
    if key not in _counters:
        _counters[key] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    return torch.empty(max(values, 1), dtype=torch.float32, device=device), _counters[key]


def partial_size(split_k: int, tiles: int, size: int) -> int:
    """Values of workspace for SPLIT_K programs per tile of `size`; 0 where nothing is split."""
    return tiles * split_k * size if split_k > 1 else 0
