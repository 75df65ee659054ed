"""What a checkpoint is, and what it would become with fewer experts. Headers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.errors import UsageError
from moe_surgery.families.base import EXPERT_WEIGHT
from moe_surgery.families.model import Model
from moe_surgery.formats.sizes import BF16_BYTES, MXFP4_BYTES

__all__ = ["MEMORY_SIZES_GB", "Inspection", "Size", "inspect_checkpoint"]

MEMORY_SIZES_GB = (8, 16, 24)


@dataclass(frozen=True, slots=True)
class Size:
    """The model with `experts` kept in every layer: weights, and tensor bytes in both storages."""

    experts: int
    parameters: int
    active_parameters: int
    mxfp4_bytes: int
    bf16_bytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint in numbers. `dtypes` and `parts` are bytes by dtype and by part of the model;
    `fits` maps a memory size in GB (10^9 bytes) to the most experts whose weights take less, per
    storage (None where not even one expert fits). `notes` say what of the checkpoint is ignored, and what
    of its config.json to know."""

    path: str
    family: str
    model_type: str
    layout: str
    layers: int
    experts: int
    top_k: int
    expert_storage: str
    parameters: int
    active_parameters: int
    parameters_per_expert: int
    tensors: int
    nbytes: int
    dtypes: dict[str, int]
    parts: dict[str, int]
    shards: dict[str, int]
    sizes: tuple[Size, ...]
    fits: dict[int, dict[str, int | None]]
    notes: tuple[str, ...] = ()

    def largest(self, nbytes: int | None, parameters: int | None, storage: str) -> int:
        """The most experts with at most so many tensor bytes (in `storage`) and weights.

        Raises UsageError where not even one expert is that small.
        """

        def fits(size: Size) -> bool:
            taken = size.mxfp4_bytes if storage == "mxfp4" else size.bf16_bytes
            return (nbytes is None or taken <= nbytes) and (
                parameters is None or size.parameters <= parameters
            )

        best = max((size.experts for size in self.sizes if fits(size)), default=0)
        if not best:
            least = self.sizes[0]
            raise UsageError(
                f"{self.path}: with one expert a layer it still has {least.parameters:,} weights, "
                f"{least.mxfp4_bytes if storage == 'mxfp4' else least.bf16_bytes:,} bytes; ask for more"
            )
        return best

    def as_dict(self) -> dict[str, object]:
        """For `--json`."""
        return asdict(self)


def inspect_checkpoint(checkpoint: Checkpoint, model: Model) -> Inspection:
    """Everything `moe-surgery inspect` says of an open checkpoint."""
    sizes = tuple(_size(model, n) for n in range(1, model.experts + 1))
    dtypes: Counter[str] = Counter()
    for ref in checkpoint.tensors.values():
        dtypes[ref.dtype] += ref.nbytes
    return Inspection(
        path=str(Path(checkpoint.path)),
        family=model.family.title,
        model_type=model.model_type,
        layout=model.layout.name,
        layers=model.layers,
        experts=model.experts,
        top_k=model.top_k,
        expert_storage=model.storage,
        parameters=model.parameters(),
        active_parameters=model.active_parameters(),
        parameters_per_expert=model.expert_parameters(),
        tensors=len(checkpoint.tensors),
        nbytes=checkpoint.nbytes,
        dtypes=dict(sorted(dtypes.items())),
        parts=_parts(model),
        shards={name: shard.identity.size for name, shard in sorted(checkpoint.shards.items())},
        sizes=sizes,
        fits={gb: _fitting(sizes, gb * 10**9) for gb in MEMORY_SIZES_GB},
        notes=model.notes,
    )


def _size(model: Model, experts: int) -> Size:
    """Bytes are those of the tensors as `prune` writes them."""
    other = weights = 0
    for tensor in model.tensors:
        kept = tensor.parameters // model.experts * experts if tensor.has_experts else tensor.parameters
        if tensor.kind == EXPERT_WEIGHT:
            weights += kept
        else:
            other += kept * tensor.stored.nbytes // tensor.parameters
    return Size(
        experts,
        model.parameters(experts),
        model.active_parameters(experts),
        other + int(weights * MXFP4_BYTES),
        other + int(weights * BF16_BYTES),
    )


def _fitting(sizes: Iterable[Size], limit: int) -> dict[str, int | None]:
    return {
        "mxfp4": max((s.experts for s in sizes if s.mxfp4_bytes <= limit), default=None),
        "bf16": max((s.experts for s in sizes if s.bf16_bytes <= limit), default=None),
    }


def _parts(model: Model) -> dict[str, int]:
    """Stored bytes by part, largest first."""
    parts: Counter[str] = Counter()
    for tensor in model.tensors:
        scales = tensor.scales.nbytes if tensor.scales else 0
        parts[_part(tensor.name)] += tensor.stored.nbytes + scales
    return dict(parts.most_common())


def _part(name: str) -> str:
    for key, part in ((".experts.", "experts"), (".router.", "router"), (".self_attn.", "attention")):
        if key in name:
            return part
    return "embedding and unembedding" if name.startswith(("model.embed", "lm_head")) else "norms"
