"""Seconds by phase and peak memory of a run."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

__all__ = ["Stopwatch", "peak_memory", "process_memory"]


@dataclass
class Stopwatch:
    """Times prefill (until the first token) and decode (every later one)."""

    start: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float = 0.0
    steps: int = 0

    def step(self, tokens: int = 1) -> None:
        """Count `tokens` new tokens at this moment."""
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.steps += tokens

    @property
    def prefill_seconds(self) -> float:
        return (self.first or self.start) - self.start

    @property
    def decode_seconds(self) -> float:
        return self.last - (self.first or self.last)

    def decode_rate(self) -> float:
        """Tokens per second after the first; 0 where there was only one."""
        return (self.steps - 1) / self.decode_seconds if self.decode_seconds else 0.0


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of the device's allocator for CUDA, else resident bytes of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = _status("VmHWM")  # what getrusage says includes the process that started this one
    if peak is None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
    return peak


def process_memory() -> int:
    """Resident bytes of this process, mapped pages included; the peak so far where the system does not tell."""
    now = _status("VmRSS")
    return peak_memory(torch.device("cpu")) if now is None else now


def _status(field: str) -> int | None:
    """Bytes that /proc/self/status tells; None where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)
