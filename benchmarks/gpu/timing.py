"""Times on a CUDA device: a captured graph's replay where work can be captured, else events around calls."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Timed", "captured", "copy_bandwidth", "timed"]

Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timed:
    """Median seconds of one call, the fastest and slowest run, and how it was called."""

    seconds: float
    fastest: float
    slowest: float
    how: str


def copy_bandwidth(device: torch.device, size: int = 4 << 30) -> float:
    """Bytes a second, read and written together, of a device-to-device copy far larger than any cache."""
    free = torch.cuda.mem_get_info(device)[0]
    size = min(size, free // 4)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / timed(lambda: target.copy_(source), repeats=20).fastest


def captured(work: Work) -> Work:
    """`work` as a graph: run twice, then captured, on the same stream. Raises what capturing raises."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
        work()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


def timed(work: Work, repeats: int = 30, how: str = "called") -> Timed:
    """Run `work` three times unmeasured, then `repeats` times between events."""
    for _ in range(3):
        work()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)
    ]
    for start, end in events:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    seconds = [start.elapsed_time(end) / 1e3 for start, end in events]
    return Timed(statistics.median(seconds), min(seconds), max(seconds), how)
