"""A checkpoint in numbers, and its sizes with fewer experts. Reads headers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from moe_surgery.checkpoint.checkpoint import Checkpoint, TensorRef
from moe_surgery.checkpoint.shard import OpenFile
from moe_surgery.errors import UsageError
from moe_surgery.families.base import Family, Role
from moe_surgery.families.model_spec import ModelSpec, ModelTensor
from moe_surgery.formats.expert_format import AS_STORED, BF16, MXFP4, ExpertFormat

if TYPE_CHECKING:
    from moe_surgery.checkpoint.gguf.model_file import GgufModel, GgufTensor

__all__ = ["MEMORY_SIZES_GB", "Inspection", "Size", "inspect_checkpoint", "part_of"]

MEMORY_SIZES_GB = (8, 16, 24)
_PARTS = {
    Role.EMBEDDING: "embedding and unembedding",
    Role.UNEMBEDDING: "embedding and unembedding",
    Role.NORM: "norms",
    Role.ATTENTION: "attention",
    Role.ROUTER: "router",
    Role.EXPERT_WEIGHT: "experts",
    Role.EXPERT_BIAS: "experts",
    Role.SHARED_EXPERT: "shared experts",
    Role.ROUTING_TABLE: "router",
    Role.OTHER: "other",
}
MTP = "multi-token prediction"
ROUTING = "softmax over the chosen experts"


@dataclass(frozen=True, slots=True)
class Size:
    """The model with `experts` kept in every layer: its weights, and the bytes of its tensors.

    `expert_weights` counts the parameters in expert weights whose bytes depend on their format;
    `other_bytes` are the bytes of everything else, and of experts that are only copied.
    """

    experts: int
    parameters: int
    active_parameters: int
    expert_weights: int
    other_bytes: int

    def nbytes(self, expert_format: ExpertFormat) -> int:
        """Bytes of the tensors, as `prune` writes them, with expert weights in `expert_format`."""
        return self.other_bytes + expert_format.nbytes(self.expert_weights)

    @property
    def mxfp4_bytes(self) -> int:
        return self.nbytes(MXFP4)

    @property
    def bf16_bytes(self) -> int:
        return self.nbytes(BF16)


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint in numbers. `dtypes` and `parts` are bytes by dtype and by part of the model; `notes`
    say what is ignored in the checkpoint, and how its config.json is read. `layers` counts MoE layers, numbered
    `layer_numbers` in the model; `mtp_layers` are the names of further ones for multi-token prediction, `groups` the
    groups of experts that the router chooses from and how many of them a token uses, None without groups."""

    path: str
    family: str
    model_type: str
    layout: str
    layers: int
    experts: int
    top_k: int
    expert_format: ExpertFormat
    parameters: int
    active_parameters: int
    parameters_per_expert: int
    tensors: int
    nbytes: int
    dtypes: dict[str, int]
    parts: dict[str, int]
    shards: dict[str, int]
    sizes: tuple[Size, ...]
    notes: tuple[str, ...] = ()
    layer_numbers: tuple[int, ...] = ()
    dense_layers: int = 0
    mtp_layers: tuple[str, ...] = ()
    groups: tuple[int, int] | None = None
    routing: str = ""
    convertible: bool = True

    @property
    def fits(self) -> dict[int, dict[str, int | None]]:
        """Memory size in GB (10^9 bytes) -> format -> the most experts that fit, None if not even one does."""
        return {
            gb: {
                f.name: max((s.experts for s in self.sizes if s.nbytes(f) <= gb * 10**9), default=None)
                for f in self.formats
            }
            for gb in MEMORY_SIZES_GB
        }

    @property
    def formats(self) -> tuple[ExpertFormat, ...]:
        """The formats in which sizes are given: MXFP4, BF16 and the checkpoint's, or the last where it is copied."""
        if not self.convertible:
            return (self.expert_format,)
        return tuple(dict.fromkeys((MXFP4, BF16, self.expert_format)))

    def largest(self, nbytes: int | None, parameters: int | None, expert_format: ExpertFormat) -> int:
        """The most experts with at most `nbytes` of tensors (in `expert_format`) and `parameters` weights.

        Raises UsageError if even one expert is too large.
        """

        def fits(size: Size) -> bool:
            return (nbytes is None or size.nbytes(expert_format) <= nbytes) and (
                parameters is None or size.parameters <= parameters
            )

        best = max((size.experts for size in self.sizes if fits(size)), default=0)
        if not best:
            least = self.sizes[0]
            raise UsageError(
                f"{self.path}: even with one expert a layer it has {least.parameters:,} weights, "
                f"{least.nbytes(expert_format):,} bytes; raise the limit"
            )
        return best

    def as_dict(self) -> dict[str, object]:
        """As plain data, for JSON."""
        sizes = [
            {
                "experts": s.experts,
                "parameters": s.parameters,
                "active_parameters": s.active_parameters,
                **{f"{f.name}_bytes": s.nbytes(f) for f in self.formats},
            }
            for s in self.sizes
        ]
        values: dict[str, object] = {f.name: getattr(self, f.name) for f in fields(self)}
        del values["convertible"]
        values |= {"expert_format": self.expert_format.name, "sizes": sizes, "fits": self.fits}
        return {"expert_storage" if key == "expert_format" else key: value for key, value in values.items()}


def inspect_checkpoint(checkpoint: Checkpoint | GgufModel, model: ModelSpec) -> Inspection:
    """The numbers that `moe-surgery inspect` shows for an open checkpoint."""
    sizes = _sizes(model)
    dtypes: Counter[str] = Counter()
    shards: Mapping[str, OpenFile] = checkpoint.shards
    tensors: Mapping[str, TensorRef | GgufTensor] = checkpoint.tensors
    for ref in tensors.values():
        dtypes[ref.dtype] += ref.nbytes
    return Inspection(
        path=str(Path(checkpoint.path)),
        family=model.family.title,
        model_type=model.model_type,
        layout=model.layout.name,
        layers=model.layers,
        experts=model.experts,
        top_k=model.top_k,
        expert_format=model.expert_format,
        parameters=model.parameters(),
        active_parameters=model.active_parameters(),
        parameters_per_expert=model.expert_parameters(),
        tensors=len(checkpoint.tensors),
        nbytes=sum(ref.nbytes for ref in tensors.values()),
        dtypes=dict(sorted(dtypes.items())),
        parts=_parts(model),
        shards={name: shard.nbytes for name, shard in sorted(shards.items())},
        sizes=sizes,
        notes=model.notes,
        layer_numbers=model.layer_numbers,
        dense_layers=model.dimensions.get("hidden_layers", model.layers) - model.layers,
        mtp_layers=model.mtp_layers,
        groups=None if model.grouping is None else (model.grouping.groups, model.grouping.used),
        routing=ROUTING if isinstance(model.family, Family) else model.family.routing,
        convertible=isinstance(model.family, Family),
    )


def _sizes(model: ModelSpec) -> tuple[Size, ...]:
    """The model with n = 1..E experts. Each expert adds the same, which is exact and takes two passes, not E."""
    none, one = _totals(model, 0), _totals(model, 1)
    each = model.expert_parameters()
    sizes = []
    for n in range(1, model.experts + 1):
        parameters, weights, other = (a + n * (b - a) for a, b in zip(none, one, strict=True))
        active = parameters - (n - min(model.top_k, n)) * each
        sizes.append(Size(n, parameters, active, weights, other))
    return tuple(sizes)


def _totals(model: ModelSpec, experts: int) -> tuple[int, int, int]:
    """Parameters, those in expert weights whose bytes depend on their format, and the bytes of everything else."""
    other = weights = 0
    copied = AS_STORED._replace(label=model.expert_format.label)
    for tensor in model.tensors:
        if tensor.role is Role.EXPERT_WEIGHT and model.expert_format != copied:
            weights += tensor.share(tensor.parameters, model.experts, experts)
        else:
            other += tensor.share(tensor.nbytes, model.experts, experts)
    return model.parameters(experts), weights, other


def _parts(model: ModelSpec) -> dict[str, int]:
    """Stored bytes by part, largest first."""
    parts: Counter[str] = Counter()
    for tensor in model.tensors:
        parts[part_of(tensor)] += tensor.nbytes
    return dict(parts.most_common())


def part_of(tensor: ModelTensor) -> str:
    """The part of the model that a tensor belongs to."""
    return MTP if tensor.mtp else _PARTS[tensor.role]
