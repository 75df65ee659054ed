"""Speed of one layer's operations, by backend and number of experts, compared with a plain read loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from moe_surgery.bench.memory import synchronize
from moe_surgery.bench.random_weights import normal, random_experts
from moe_surgery.bench.rounds import check_numbers, interleaved
from moe_surgery.errors import UsageError
from moe_surgery.kernels import Backend, backend_states, select_backend
from moe_surgery.kernels.weights import ExpertWeights, Mxfp4Weight

__all__ = [
    "KernelCall",
    "KernelFigures",
    "KernelRun",
    "kernel_calls",
    "kernel_figures",
    "measure_kernels",
    "usable_backends",
]

TOP_K = 4
HIDDEN = 2880


@dataclass(frozen=True, slots=True)
class KernelRun:
    """One call in round `number`: see `KernelFigures`."""

    backend: str
    operation: str
    experts: int
    tokens: int
    read_bytes: int
    number: int
    seconds: float


@dataclass(frozen=True, slots=True)
class KernelFigures:
    """One operation: median seconds of a call, the bytes of weights it reads, and bytes per second.

    `operation`: "route", "experts" (the chosen ones, MXFP4) or "dense" (one BF16 product of hidden by
    hidden). `share` is of the read loop's rate measured in the same run.
    """

    backend: str
    operation: str
    experts: int
    tokens: int
    seconds: float
    read_bytes: int
    rate: float
    share: float

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class KernelCall:
    """One operation of one backend: `run` reads `read_bytes` of weights."""

    backend: str
    operation: str
    experts: int
    tokens: int
    read_bytes: int
    run: Callable[[], Tensor]


def usable_backends(device: torch.device) -> list[str]:
    """Names of the backends that run on `device` here."""
    names = []
    for name in backend_states():
        try:
            select_backend(device, name)
        except UsageError:
            continue
        names.append(name)
    return names


@torch.inference_mode()
def measure_kernels(
    backends: Sequence[str],
    device: torch.device,
    *,
    expert_counts: Sequence[int] = (4, 8, 16, 32),
    tokens: Sequence[int] = (1,),
    hidden: int = HIDDEN,
    rounds: int = 10,
) -> Iterator[KernelRun]:
    """Every operation for each number of experts and tokens, backends in alternation. BF16, random weights.

    Raises UsageError for a backend that does not run here, or numbers out of range (`hidden` must be a
    multiple of 32).
    """
    check_numbers(expert_counts=expert_counts, tokens=tokens, hidden=[hidden], rounds=[rounds])
    for count in expert_counts:
        for calls in kernel_calls(backends, device, count, tokens=tokens, hidden=hidden):
            timers = [partial(_seconds, call.run, device) for call in calls]
            for timer in timers:  # warm-up
                timer()
            for number, i, seconds in interleaved(timers, rounds):
                c = calls[i]
                yield KernelRun(c.backend, c.operation, c.experts, c.tokens, c.read_bytes, number, seconds)


def kernel_figures(runs: Sequence[KernelRun], bandwidth: float) -> list[KernelFigures]:
    """Figures of the runs so far; `bandwidth` in bytes per second."""
    spent: dict[tuple[str, str, int, int, int], list[float]] = {}
    for r in runs:
        spent.setdefault((r.backend, r.operation, r.experts, r.tokens, r.read_bytes), []).append(r.seconds)
    figures = []
    for call, several in spent.items():
        seconds = statistics.median(several)
        rate = call[-1] / seconds
        figures.append(KernelFigures(*call[:-1], seconds, call[-1], rate, rate / bandwidth))
    return figures


@torch.inference_mode()
def kernel_calls(
    backends: Sequence[str],
    device: torch.device,
    experts: int,
    *,
    tokens: Sequence[int] = (1,),
    hidden: int = HIDDEN,
) -> Iterator[list[KernelCall]]:
    """For each number of tokens every operation of every backend, all over the same random weights.

    Raises UsageError for a backend that does not run here, or a `hidden` that is not a multiple of 32.
    """
    if hidden % 32:
        raise UsageError(f"`hidden` {hidden}: must be a multiple of 32, the block of MXFP4")
    chosen = [select_backend(device, name) for name in backends]
    weights = random_experts(experts, hidden, device)
    router, bias = normal(device, experts, hidden, scale=hidden**-0.5), normal(device, experts)
    square = normal(device, hidden, hidden, scale=hidden**-0.5)
    random = torch.Generator().manual_seed(0)
    for number in tokens:
        x = torch.randn(number, hidden, generator=random).to(device, torch.bfloat16)
        calls: list[KernelCall] = []
        for backend in chosen:
            calls += _calls(backend, x, router, bias, weights, square)
        yield calls


def _calls(
    backend: Backend, x: Tensor, router: Tensor, bias: Tensor, weights: ExpertWeights, square: Tensor
) -> list[KernelCall]:
    """One of each operation."""
    top_k = min(TOP_K, len(router))
    ids, routing_weights = backend.route(x, router, bias, top_k)
    read = int(torch.unique(ids).numel()) * _expert_bytes(weights)
    calls: list[tuple[str, int, Callable[[], Tensor]]] = [
        ("route", router.nbytes, lambda: backend.route(x, router, bias, top_k)[1]),
        ("experts", read, partial(backend.experts, x, ids, routing_weights, weights)),
        ("dense", square.nbytes, partial(backend.linear, x, square)),
    ]
    return [
        KernelCall(backend.name, operation, len(router), len(x), nbytes, run)
        for operation, nbytes, run in calls
    ]


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def _expert_bytes(weights: ExpertWeights) -> int:
    total = weights.gate_up_bias[0].nbytes + weights.down_bias[0].nbytes
    for weight in (weights.gate_up, weights.down):
        assert isinstance(weight, Mxfp4Weight)
        total += weight.blocks[0].nbytes + weight.scales[0].nbytes
    return total
