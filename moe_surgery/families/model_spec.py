"""An identified checkpoint: its family, its dimensions, and where each tensor is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from moe_surgery.checkpoint.checkpoint import TensorRef
from moe_surgery.errors import InvalidInputError
from moe_surgery.families.base import AnyFamily, Family, GgufFamily, Layout, Role
from moe_surgery.formats.expert_format import ExpertFormat

if TYPE_CHECKING:
    from moe_surgery.families.grouping import Grouping

__all__ = ["EXPERT", "ModelSpec", "ModelTensor"]

EXPERT = "{expert}"
"""Replaces the expert's number in the name of a tensor that every expert has."""


@dataclass(frozen=True, slots=True)
class ModelTensor:
    """One tensor of the output layout and where the source keeps it.

    `shape` is the logical shape with all source experts: for an expert weight of a described family (experts,
    rows, columns). `stored` is the source tensor (for MXFP4 its blocks), `scales` the MXFP4 scales. `format`
    is that of an expert weight of such a family, None for others. `layer` is the row of the plan: the MoE
    layer's index among them, or among the MTP layers where `mtp` is set.

    In a checkpoint that stores each expert separately `name` holds `EXPERT` for its number and `pieces` are the
    experts' tensors in order, of which `stored` is the first. `axis` counts experts in others; the last
    `tail` of it always stay. `values` is the number of weights, where it is not that of the elements.
    """

    name: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]
    stored: TensorRef
    scales: TensorRef | None = None
    format: ExpertFormat | None = None
    pieces: tuple[TensorRef, ...] = ()
    axis: int = 0
    tail: int = 0
    mtp: bool = False
    values: int | None = None

    @property
    def parameters(self) -> int:
        return prod(self.shape) if self.values is None else self.values

    @property
    def nbytes(self) -> int:
        """Bytes in the source, scales included."""
        if self.pieces:
            return self.stored.nbytes * len(self.pieces)
        return self.stored.nbytes + (self.scales.nbytes if self.scales else 0)

    @property
    def has_experts(self) -> bool:
        return self.role.has_experts

    def share(self, total: int, experts: int, kept: int) -> int:
        """Of a `total` over all of it, that with `kept` of `experts`; exact, as experts are of equal size."""
        if not self.has_experts or not total:
            return total
        rows = experts + self.tail
        return total // rows * (kept + self.tail)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """An identified checkpoint: family, layout, dimensions and all tensors in output order.

    `expert_format` is that of all expert weights. `notes` say what is ignored in the checkpoint, and what is
    read differently than one might expect. `moe_layers` are the model's numbers of its MoE layers
    (empty: all, from 0), `mtp_layers` the names of those MoE layers that predict further tokens.
    `grouping` is None where any choice of experts is valid. `minimum` is the fewest experts that a
    layer may keep. `refusal` says why no expert can be dropped, None where some can.
    """

    family: AnyFamily | GgufFamily
    layout: Layout
    config: Mapping[str, object]
    dimensions: Mapping[str, int]
    tensors: tuple[ModelTensor, ...]
    expert_format: ExpertFormat
    notes: tuple[str, ...] = ()
    moe_layers: tuple[int, ...] = ()
    mtp_layers: tuple[str, ...] = ()
    grouping: Grouping | None = None
    minimum: int = 1
    refusal: str | None = None

    @property
    def model_type(self) -> str:
        return self.family.model_type

    @property
    def model_types(self) -> tuple[str, ...]:
        """The model types that plans and rankings for this model may name; several for some GGUF files."""
        return self.family.model_types if isinstance(self.family, GgufFamily) else (self.model_type,)

    @property
    def hub_config(self) -> Mapping[str, object]:
        """config.json in the hub's layout."""
        return self.layout.hub_config(self.config) if self.layout.hub_config else self.config

    @property
    def described(self) -> Family:
        """The family, if it has the full description that the runtime and exporting need.

        Raises InvalidInputError for a family that is known by its tensor names alone.
        """
        if isinstance(self.family, Family):
            return self.family
        raise InvalidInputError(
            f"{self.family.title} ({self.model_type}) checkpoints can be inspected, planned for, pruned and "
            "verified, and profile, search and evaluate run them on transformers; repair, trace, generate, export and "
            "conversions support gpt-oss only"
        )

    def require_description(self) -> None:
        """Raise as `described` does."""
        _ = self.described

    @property
    def layers(self) -> int:
        """MoE layers, without those for multi-token prediction: the rows of a plan."""
        return self.dimensions["layers"]

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """The MoE layers as the model numbers them."""
        return self.moe_layers or tuple(range(self.layers))

    @property
    def experts(self) -> int:
        return self.dimensions["experts"]

    @property
    def top_k(self) -> int:
        return self.dimensions["top_k"]

    def without_mtp(self) -> ModelSpec:
        """The model without its layers for multi-token prediction."""
        return replace(self, tensors=tuple(t for t in self.tensors if not t.mtp), mtp_layers=())

    def parameters(self, experts: int | None = None) -> int:
        """Number of weights with `experts` kept in every layer (default: all), router rows included."""
        kept = self.experts if experts is None else experts
        return sum(t.share(t.parameters, self.experts, kept) for t in self.tensors)

    def active_parameters(self, experts: int | None = None) -> int:
        """Weights that one token uses: all but the experts the router did not choose."""
        kept = self.experts if experts is None else experts
        return self.parameters(kept) - (kept - min(self.top_k, kept)) * self.expert_parameters()

    def expert_parameters(self) -> int:
        """Weights of one expert over all layers, without its router rows."""
        return sum(
            t.share(t.parameters, self.experts, 1) - t.share(t.parameters, self.experts, 0)
            for t in self.tensors
            if t.role.in_expert
        )
