"""One MoE layer of gpt-oss-20b: router and experts, beside what others offer, in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.gate import Verdict, judge, speed_up
from benchmarks.gpu.peers import TRANSFORMERS, grouped_4bit, transformers_layer
from benchmarks.gpu.timing import captured, timed
from benchmarks.gpu.weights import TOP_K, as_dense, random_experts
from moe_surgery.formats.expert_format import BF16, MXFP4
from moe_surgery.kernels.interface import Backend
from moe_surgery.kernels.reference import ReferenceBackend
from moe_surgery.kernels.weights import ExpertWeights

__all__ = ["EXPERTS", "TOKENS", "bytes_read", "measure_layer"]

HIDDEN = 2880
EXPERTS = (4, 8, 16, 31, 32)
TOKENS = (1, 2, 4, 8, 16, 32, 64)
# Copies of the weights are used in turn, enough of them that each has left the L2 cache by its next turn.
CACHE_TIMES = 4
MOST_COPIES = 8


@dataclass(frozen=True, slots=True)
class Method:
    """A way to compute the layer: a call per copy of the weights, and the bytes of one expert to it."""

    name: str
    calls: list[Callable[[Tensor], Tensor]]
    packed: bool
    captures: bool


def bytes_read(distinct: float, experts: int, hidden: int, packed: bool) -> float:
    """Bytes a layer must read: the router, and `distinct` experts with their biases."""
    expert = (MXFP4 if packed else BF16).nbytes(3 * hidden * hidden) + 3 * hidden * BF16.block_bytes
    return experts * (hidden + 1) * BF16.block_bytes + distinct * expert


def measure_layer(
    experts: int, backend: Backend, bandwidth: float, device: torch.device, tokens: tuple[int, ...] = TOKENS
) -> Iterator[dict[str, object]]:
    """A row per number of tokens and method; `bandwidth` is the measured copy's, in bytes a second."""
    top_k = min(TOP_K, experts)
    copies = _copies(experts, top_k, device)
    packed = [random_experts(experts, HIDDEN, device) for _ in range(copies)]
    dense = [as_dense(p) for p in packed]
    like: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    routers = [
        (torch.randn(experts, HIDDEN, **like) / HIDDEN**0.5, torch.zeros(experts, **like))
        for _ in range(copies)
    ]
    for count in tokens:
        x = torch.randn(count, HIDDEN, dtype=torch.bfloat16, device=device)
        chosen = [ReferenceBackend().route(x, *router, top_k) for router in routers]
        distinct = sum(int(torch.unique(ids).numel()) for ids, _ in chosen) / copies
        exact = ReferenceBackend().experts(x.float(), *_float_weights(chosen[0]), dense[0])
        rows = [
            _row(method, x, exact, distinct, experts, bandwidth)
            for method in _methods(backend, packed, dense, routers, chosen, top_k)
        ]
        others = [
            r["us"] for r in rows if str(r["method"]).startswith("transformers") and r["gate"] == "green"
        ]
        fastest = min(map(float, others), default=None)  # type: ignore[arg-type]
        for row in rows:
            if str(row["method"]).startswith("moe_surgery") and row["us"] is not None:
                verdict = Verdict(row["gate"] == "green", float(str(row["error"])))
                row["against the fastest of transformers'"] = speed_up(
                    float(str(row["us"])), fastest, verdict
                )
            yield row


def _float_weights(choice: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return choice[0], choice[1].float()


def _copies(experts: int, top_k: int, device: torch.device) -> int:
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    touched = bytes_read(top_k, experts, HIDDEN, True)
    weight_bytes = bytes_read(experts, experts, HIDDEN, True) + bytes_read(experts, experts, HIDDEN, False)
    fitting = int(torch.cuda.mem_get_info(device)[0] * 0.6 / weight_bytes)
    return max(1, min(fitting, MOST_COPIES, int(CACHE_TIMES * cache / touched) + 1))


def _methods(
    backend: Backend,
    packed: list[ExpertWeights],
    dense: list[ExpertWeights],
    routers: list[tuple[Tensor, Tensor]],
    chosen: list[tuple[Tensor, Tensor]],
    top_k: int,
) -> Iterator[Method | str]:
    """What can be run here; for what cannot, a line that says so."""

    def ours(weights: ExpertWeights, router: tuple[Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: backend.experts(x, *backend.route(x, *router, top_k), weights)

    yield Method("moe_surgery, MXFP4", [ours(*p) for p in zip(packed, routers, strict=True)], True, True)
    yield Method("moe_surgery, BF16", [ours(*p) for p in zip(dense, routers, strict=True)], False, True)
    for name, captures in TRANSFORMERS.items():
        title = f"transformers {name}, BF16"
        try:
            calls = [transformers_layer(w, r, top_k, name) for w, r in zip(dense, routers, strict=True)]
        except ImportError as error:
            yield f"{title}: {error}"
            continue
        yield Method(title, calls, False, captures)
    title = "grouped-nf4-gemm, MXFP4, routing not timed"
    try:
        calls = [grouped_4bit(w, *c) for w, c in zip(packed, chosen, strict=True)]
    except ImportError as error:
        yield f"{title}: {error}"
        return
    yield Method(title, calls, True, False)


def _row(
    method: Method | str, x: Tensor, exact: Tensor, distinct: float, experts: int, bandwidth: float
) -> dict[str, object]:
    row: dict[str, object] = {"experts": experts, "tokens": len(x), "distinct experts": round(distinct, 1)}
    empty = dict.fromkeys(("us", "GB/s", "share of copy", "how", "error"))
    if isinstance(method, str):
        name, _, why = method.partition(": ")
        return {**row, "method": name, **empty, "gate": f"not run: {why}"}
    row["method"] = method.name

    def work() -> None:
        for call in method.calls:
            call(x)

    try:
        verdict = judge(method.calls[0](x), exact)
        result = timed(captured(work), how="graph") if method.captures else timed(work, how="called")
    except Exception as error:  # a peer that fails must not end the run, and is shown as failed
        if method.name.startswith("moe_surgery"):
            raise
        return {**row, **empty, "gate": f"failed: {str(error).splitlines()[0][:120]}"}
    seconds = result.seconds / len(method.calls)
    rate = bytes_read(distinct, experts, x.shape[1], method.packed) / seconds
    return {
        **row, "us": seconds * 1e6, "GB/s": rate / 1e9, "share of copy": rate / bandwidth, "how": result.how,
        "error": verdict.error, "gate": "green" if verdict.green else "RED",
    }  # fmt: skip
