"""Memory bandwidth of this machine, and memory in use."""

from __future__ import annotations

import time

import torch

from moe_surgery.runtime.usage import process_memory

__all__ = ["memory_in_use", "read_bandwidth", "synchronize"]

BUFFER_BYTES = 512 << 20  # larger than a last-level cache
REPEATS = 5


def synchronize(device: torch.device) -> None:
    """Wait for all work on `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def read_bandwidth(device: torch.device, nbytes: int = BUFFER_BYTES) -> float:
    """Bytes per second of a plain read loop: a sum over `nbytes` of float32, the best of a few runs.

    On the CPU with torch's number of threads. An upper bound for kernels while memory is as fast as during
    the loop; on shared machines it changes by the second.
    """
    buffer = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        total = buffer.sum()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
        assert float(total) > 0
    return buffer.nbytes / best


def memory_in_use(device: torch.device) -> int:
    """Bytes: of the device's allocator for CUDA, else resident pages of this process (mapped ones count)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return process_memory()
