"""A GGUF model in numbers. Reads headers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Final

from moe_surgery.checkpoint.gguf.model_file import GgufModel
from moe_surgery.checkpoint.text import describe_value
from moe_surgery.families.base import GgufFamily
from moe_surgery.families.model_spec import ModelSpec
from moe_surgery.surgery.gguf.metadata import OWN
from moe_surgery.surgery.inspect import Inspection, inspect_checkpoint, part_of
from moe_surgery.surgery.routing import problem_of_count
from moe_surgery.surgery.serving import LLAMA_CPP_COUNTS

__all__ = ["GgufInspection", "inspect_gguf"]

_IMATRIX: Final = "quantize.imatrix."
_SHOWN: Final = 200


@dataclass(frozen=True, slots=True)
class GgufInspection(Inspection):
    """`types` are bytes by type, by part of the model; `bytes_per_expert` are those of one expert over all layers.

    `possible_counts` are the numbers of experts that the router can choose from, `fast_counts` those among them for
    which llama.cpp has a fused CUDA router. `imatrix` says which importance matrix made the file, `pruned` of which
    file it was made. `refusal` is why no expert can be dropped, None where some can.
    """

    architecture: str = ""
    types: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    bytes_per_expert: int = 0
    possible_counts: tuple[int, ...] = ()
    fast_counts: tuple[int, ...] = ()
    imatrix: Mapping[str, object] = field(default_factory=dict)
    pruned: Mapping[str, object] = field(default_factory=dict)
    refusal: str | None = None


def inspect_gguf(model: GgufModel, spec: ModelSpec) -> GgufInspection:
    """The numbers that `moe-surgery inspect` shows for an open GGUF model."""
    known = inspect_checkpoint(model, spec)
    assert isinstance(spec.family, GgufFamily)
    types: dict[str, Counter[str]] = {}
    for tensor in spec.tensors:
        types.setdefault(part_of(tensor), Counter())[tensor.stored.dtype] += tensor.nbytes
    possible = tuple(
        n for n in range(1, spec.experts + 1) if problem_of_count(spec, n, min(spec.top_k, n)) is None
    )
    fast = () if spec.grouping else tuple(n for n in possible if n in LLAMA_CPP_COUNTS)
    return GgufInspection(
        **{f.name: getattr(known, f.name) for f in fields(known)},
        architecture=spec.family.architecture,
        types={part: dict(counts.most_common()) for part, counts in types.items()},
        bytes_per_expert=sum(t.nbytes // spec.experts for t in spec.tensors if t.role.in_expert),
        possible_counts=possible if spec.refusal is None else (spec.experts,),
        fast_counts=fast if spec.refusal is None else (),
        imatrix=_scalars(model, _IMATRIX),
        pruned=_scalars(model, OWN),
        refusal=spec.refusal,
    )


def _scalars(model: GgufModel, prefix: str) -> dict[str, object]:
    """The numbers and texts under `prefix`, by what follows it."""
    found: dict[str, object] = {}
    for key, entry in model.metadata.items():
        if key.startswith(prefix) and entry.item_type < 0:
            value = model.value(key)
            shown = value[:_SHOWN] if isinstance(value, str) else value
            found[key.removeprefix(prefix)] = (
                shown if isinstance(shown, (str, int, float)) else describe_value(shown)
            )
    return found
