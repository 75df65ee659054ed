"""Inputs of the experts, and the formulas of experts and routing by brute force in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moe_surgery.kernels.reference.experts import experts_gathered, experts_grouped  # noqa: E402
from moe_surgery.kernels.weights import DenseWeight, ExpertWeights, Mxfp4Weight, Weight  # noqa: E402
from tests.support.checkpoints import decode, random_bf16  # noqa: E402

WAYS = {"grouped": experts_grouped, "gathered": experts_gathered}


@dataclass
class Case:
    x: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    experts: ExpertWeights

    def run(self, way: str, dtype: torch.dtype) -> torch.Tensor:
        x, weights = (torch.from_numpy(a).to(dtype) for a in (self.x, self.weights))
        return WAYS[way](x, torch.from_numpy(self.ids), weights, self.experts)


def make_case(
    seed: int = 0,
    *,
    tokens: int = 3,
    experts: int = 4,
    top_k: int = 2,
    hidden: int = 64,
    intermediate: int = 32,
    stored: int | None = None,
    packed: bool = True,
) -> Case:
    """`stored` experts of which the router knows `experts`; without it they are the same."""
    rng = np.random.default_rng(seed)
    num_stored = stored or experts
    weights = []
    for rows, columns in ((2 * intermediate, hidden), (hidden, intermediate)):
        blocks = rng.integers(0, 256, (num_stored, rows, columns // 32, 16), np.uint8)
        scales = rng.integers(119, 125, (num_stored, rows, columns // 32), np.uint8)
        if packed:
            weights.append(Mxfp4Weight(torch.from_numpy(blocks), torch.from_numpy(scales)))
        else:
            bits = torch.from_numpy(decode(blocks, scales).view(np.int16)).view(torch.bfloat16)
            weights.append(DenseWeight(bits.transpose(1, 2).contiguous()))
    bits = [random_bf16(rng, (num_stored, rows)).view(np.int16) for rows in (2 * intermediate, hidden)]
    biases = [torch.from_numpy(b).view(torch.bfloat16) for b in bits]
    expert_map = None if stored is None else torch.from_numpy(rng.permutation(stored)[:experts])
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])
    mixed = rng.random((tokens, top_k))
    return Case(
        rng.standard_normal((tokens, hidden)),
        ids,
        mixed / mixed.sum(1, keepdims=True),
        ExpertWeights(weights[0], biases[0], weights[1], biases[1], expert_map),
    )


def plain(weight: Weight) -> np.ndarray:
    """A weight as float64 [experts, rows, columns]."""
    if isinstance(weight, DenseWeight):
        return weight.values.double().transpose(1, 2).numpy()
    bits = decode(weight.blocks.numpy(), weight.scales.numpy())
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def brute_force_experts(case: Case) -> np.ndarray:
    """The formula in float64, one token and one expert at a time."""
    e = case.experts
    gate_up, down = plain(e.gate_up), plain(e.down)
    gate_up_bias, down_bias = e.gate_up_bias.double().numpy(), e.down_bias.double().numpy()
    y = np.zeros_like(case.x)
    for token, (ids, weights) in enumerate(zip(case.ids, case.weights, strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            stored_expert = expert if e.expert_map is None else int(e.expert_map[expert])
            h = gate_up[stored_expert] @ case.x[token] + gate_up_bias[stored_expert]
            gate, up = np.minimum(h[::2], e.limit), np.clip(h[1::2], -e.limit, e.limit)
            z = (up + 1) * gate / (1 + np.exp(-e.alpha * gate))
            y[token] += weight * (down[stored_expert] @ z + down_bias[stored_expert])
    return y


def brute_force_route(logits: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array([sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k] for row in logits])
    chosen = np.exp(np.take_along_axis(logits, ids, 1) - logits.max(1, keepdims=True))
    return ids, chosen / chosen.sum(1, keepdims=True)
