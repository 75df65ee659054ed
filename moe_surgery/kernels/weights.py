"""Weights as a backend receives them: as stored, experts packed, with a map of those in use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from moe_surgery.kernels.q8_0 import Matrix

__all__ = ["DenseWeight", "ExpertWeights", "Layer", "Mxfp4Weight", "Projection", "Weight"]


@dataclass(frozen=True, slots=True)
class Mxfp4Weight:
    """One linear layer per stored expert in MXFP4: out = x @ W.T with W [rows, columns].

    blocks: uint8 [stored experts, rows, columns/32, 16]; scales: uint8 [stored experts, rows, columns/32].
    """

    blocks: Tensor
    scales: Tensor

    @property
    def rows(self) -> int:
        return self.blocks.shape[1]

    @property
    def columns(self) -> int:
        return self.blocks.shape[2] * 32


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """One linear layer per stored expert in a floating-point dtype, transposed: out = x @ W.

    values: [stored experts, columns, rows], usually bfloat16.
    """

    values: Tensor

    @property
    def rows(self) -> int:
        return self.values.shape[2]

    @property
    def columns(self) -> int:
        return self.values.shape[1]


Weight = Mxfp4Weight | DenseWeight
AnyMatrix = TypeVar("AnyMatrix", bound=Matrix, covariant=True)


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The experts of one MoE layer.

    gate_up: hidden -> 2 * intermediate, gate rows at even and up rows at odd positions; down:
    intermediate -> hidden; biases [stored experts, 2 * intermediate] and [stored experts, hidden].
    `expert_map` [experts] int64 holds the index in the stored tensors of each expert of the router; None for
    the identity. A pruned view is the full model's tensors with an expert map.
    `limit` and `alpha` are those of the clamped SwiGLU.
    """

    gate_up: Weight
    gate_up_bias: Tensor
    down: Weight
    down_bias: Tensor
    expert_map: Tensor | None = None
    limit: float = 7.0
    alpha: float = 1.702


@dataclass(frozen=True, slots=True)
class Projection(Generic[AnyMatrix]):
    """weight [rows, columns] as stored or in Q8_0, bias [rows] or None."""

    weight: AnyMatrix
    bias: Tensor | None

    @property
    def pair(self) -> tuple[AnyMatrix, Tensor | None]:
        return self.weight, self.bias


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer's weights. `router` has one row per kept expert, in plan order."""

    attention_norm: Tensor
    q: Projection[Matrix]
    k: Projection[Matrix]
    v: Projection[Matrix]
    o: Projection[Matrix]
    sinks: Tensor
    mlp_norm: Tensor
    router: Projection[Tensor]
    experts: ExpertWeights
    top_k: int
