"""Shapes to test, and random layers of those shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from moe_surgery.kernels.weights import DenseWeight, ExpertWeights, Mxfp4Weight, Weight
from tests.kernels.triton import oracle

EXPERTS = (1, 2, 3, 4, 5, 7, 8, 13, 31, 32, 33, 96, 144, 160, 255)
TOP_K = (1, 2, 3, 4, 8)
TOKENS = (1, 2, 3, 5, 17, 64)
FORMATS = ("mxfp4", "dense")
# Expert counts that behave alike: fewer than tokens, odd, around a power of two, more than a warp.
FEW_EXPERTS = (1, 3, 8, 33, 255)  # one or two of each class, for tests that the interpreter takes long over
CLASSES = ((1, 2, 3, 4), (5, 7, 8), (13, 31, 32, 33), (96, 144, 160, 255))
# Multiples of 32 that are no powers of two: every block has a masked end.
HIDDEN, INTERMEDIATE = 96, 32


@dataclass(frozen=True)
class Case:
    experts: int
    top_k: int
    tokens: int
    format: str
    indexed: bool

    def __str__(self) -> str:
        view = "-view" if self.indexed else ""
        return f"{self.experts}x{self.top_k}-tokens{self.tokens}-{self.format}{view}"


def every_case() -> list[Case]:
    """The full grid; a pruned view for every other case."""
    grid = product(EXPERTS, TOP_K, TOKENS, FORMATS)
    kept = [row for row in grid if row[1] <= row[0]]
    return [Case(*row, indexed=bool(n % 2)) for n, row in enumerate(kept)]


def covering_cases(
    top_k: Sequence[int] = TOP_K, tokens: Sequence[int] = (*TOKENS[:-1], TOKENS[-1] // 2 + 1)
) -> list[Case]:
    """Cases in which any two of (class of expert counts, top-k, tokens, format, view) meet, chosen greedily.

    Every expert count is in one, and formats take turns where either will do. The largest batch is halved, and
    few pairs of token and slot are preferred to many: the interpreter is slow. Deterministic.
    """
    grid = [Case(*row) for row in product(EXPERTS, top_k, tokens, FORMATS, (False, True)) if row[1] <= row[0]]
    pairs = {case: _pairs(case) for case in grid}
    missing = set().union(*pairs.values())
    chosen: list[Case] = []

    def score(case: Case) -> tuple[float, int]:
        assignments = case.tokens * case.top_k
        cost = 16 + min(case.experts, assignments) + assignments // 4
        return len(pairs[case] & missing) / cost, -sum(other.format == case.format for other in chosen)

    while missing:
        best = max(grid, key=score)
        missing -= pairs[best]
        chosen.append(best)
    return chosen


def _pairs(case: Case) -> set[tuple[object, ...]]:
    kind = next(n for n, members in enumerate(CLASSES) if case.experts in members)
    values = [("class", kind), ("k", case.top_k), ("tokens", case.tokens), ("format", case.format)]
    values.append(("view", case.indexed))
    return {(a, b) for n, a in enumerate(values) for b in values[n + 1 :]} | {("experts", case.experts)}


@dataclass(frozen=True)
class Layer:
    """Random inputs of one case, and the experts' matrices in float64 as the router numbers them."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    experts: ExpertWeights
    gate_up: np.ndarray
    down: np.ndarray

    def expected(self) -> np.ndarray:
        expert_map = self.experts.expert_map
        biases = [b.double().numpy() for b in (self.experts.gate_up_bias, self.experts.down_bias)]
        if expert_map is not None:
            biases = [b[expert_map.numpy()] for b in biases]
        in_float64 = [t.double().numpy() for t in (self.x, self.weights)]
        return oracle.experts(
            in_float64[0], self.ids.numpy(), in_float64[1], self.gate_up, biases[0], self.down, biases[1]
        )


def layer(
    case: Case, hidden: int = HIDDEN, intermediate: int = INTERMEDIATE, dtype: torch.dtype = torch.float32,
    scales: tuple[int, int] = (119, 127), ids: torch.Tensor | None = None,
) -> Layer:  # fmt: skip
    """A layer of `case`; MXFP4 scales lie in the half-open range `scales`."""
    random = torch.Generator().manual_seed(case.experts * 1000 + case.top_k * 100 + case.tokens)
    stored = case.experts + 3 if case.indexed else case.experts
    expert_map = torch.randperm(stored, generator=random)[: case.experts] if case.indexed else None
    gate_up, gate_up_values = _weight(case.format, stored, 2 * intermediate, hidden, scales, dtype, random)
    down, down_values = _weight(case.format, stored, hidden, intermediate, scales, dtype, random)
    if expert_map is not None:
        gate_up_values, down_values = gate_up_values[expert_map.numpy()], down_values[expert_map.numpy()]
    if ids is None:
        scores = torch.rand(case.tokens, case.experts, generator=random)
        ids = scores.argsort(dim=1)[:, : case.top_k].contiguous()
    experts = ExpertWeights(
        gate_up, torch.randn(stored, 2 * intermediate, generator=random).to(dtype),
        down, torch.randn(stored, hidden, generator=random).to(dtype), expert_map,
    )  # fmt: skip
    x = torch.randn(case.tokens, hidden, generator=random).to(dtype)
    weights = torch.rand(case.tokens, case.top_k, generator=random).to(dtype)
    return Layer(x, ids, weights, experts, gate_up_values, down_values)


def _weight(
    kind: str, experts: int, rows: int, columns: int, scales: tuple[int, int], dtype: torch.dtype,
    random: torch.Generator,
) -> tuple[Weight, np.ndarray]:  # fmt: skip
    if kind == "dense":
        values = (torch.randn(experts, columns, rows, generator=random) / columns**0.5).to(dtype)
        return DenseWeight(values), values.double().transpose(1, 2).numpy()
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=random)
    scale = torch.randint(*scales, (experts, rows, columns // 32), dtype=torch.uint8, generator=random)
    return Mxfp4Weight(blocks, scale), oracle.decoded(blocks.numpy(), scale.numpy())
