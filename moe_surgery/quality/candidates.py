"""Models to compare with the full one: plans as views, and pruned checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.source import Folder, read_optional
from moe_surgery.checkpoint.strict_json import parse_json
from moe_surgery.errors import InvalidInputError, PlanMismatchError
from moe_surgery.kernels.weights import Layer
from moe_surgery.quality.hidden_states import HiddenStates
from moe_surgery.quality.layers import LayerModel, MoeLayer
from moe_surgery.runtime.view import view_layer
from moe_surgery.surgery.manifest import find_manifest
from moe_surgery.surgery.names import MAPPING_NAME

__all__ = ["Candidate", "pruned_candidate", "source_experts"]

MAX_MAPPING_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model to compare with the full one: a plan as a view of it, or another checkpoint.

    `model` is None for a view. `kept` lists the source experts of each layer; None if unknown (rerouted
    routes are then not counted).
    """

    name: str
    kept: tuple[tuple[int, ...], ...] | None
    top_k: int | None = None
    model: LayerModel | None = None
    provenance: dict[str, object] = field(default_factory=dict)

    def layer(self, number: int, full: Layer) -> Layer:
        """The layer of a view, sharing weights with `full`."""
        assert self.kept is not None
        return view_layer(full, self.kept[number], self.top_k)

    def enter(self, number: int, full: LayerModel, states: HiddenStates) -> MoeLayer | None:
        """Take `states` into the candidate's layer `number`, as `LayerModel.enter`."""
        if self.model is not None:
            return self.model.enter(number, states)
        layer = full.enter(number, states)
        if layer is None:
            return None
        assert self.kept is not None
        return layer.restricted(self.kept[layer.row], self.top_k)


def pruned_candidate(
    name: str, files: Folder, other: LayerModel, full: LayerModel, numbers: Sequence[int]
) -> Candidate:
    """The checkpoint in `files`, loaded as `other`; its source experts come from its manifest or expert mapping.

    `numbers` are the full model's numbers of its MoE layers.

    Raises PlanMismatchError if it cannot be pruned from `full`, InvalidInputError for a mapping that does not
    fit, and as `find_manifest`.
    """
    sizes = [(m.depth, m.moe_layers, m.vocab_size, m.hidden_size) for m in (other, full)]
    if sizes[0] != sizes[1]:
        raise PlanMismatchError(
            f"{name}: has {other.depth} layers, hidden size {other.hidden_size}, vocabulary {other.vocab_size}; "
            f"the full model has {full.depth}, {full.hidden_size}, {full.vocab_size}"
        )
    kept, provenance = source_experts(files, numbers, full.experts)
    if kept is not None and any(len(row) != other.experts for row in kept):
        raise InvalidInputError(
            f"{name}: its manifest or {MAPPING_NAME} does not list its {other.experts} experts"
        )
    return Candidate(name, kept, model=other, provenance=provenance)


def source_experts(
    files: Folder, layers: int | Sequence[int], experts: int
) -> tuple[tuple[tuple[int, ...], ...] | None, dict[str, object]]:
    """Source experts by layer and provenance of the checkpoint in `files`, pruned from a model of that size.

    `layers` are the model's numbers of its MoE layers, or how many there are.

    From our manifest or a published model's mapping; None for experts where there is neither, or it is of another
    model.
    """
    numbers = range(layers) if isinstance(layers, int) else layers
    manifest = find_manifest(files)
    if manifest is not None:
        plan = manifest.plan
        fits = (plan.num_layers, plan.num_source_experts) == (len(numbers), experts)
        return (plan.layers if fits else None), manifest.provenance
    raw = read_optional(files, MAPPING_NAME, limit=MAX_MAPPING_BYTES, what="an expert mapping")
    if raw is None:
        return None, {}
    where = printable_path(files.path / MAPPING_NAME)
    parsed = parse_json(raw, where=where)
    try:
        rows = [parsed[str(number)] for number in numbers]  # type: ignore[index]
        kept = tuple(tuple(int(old) for old in sorted(row, key=row.__getitem__)) for row in rows)
        if any(set(row.values()) != set(range(len(row))) for row in rows):
            raise ValueError
        if any(not 0 <= old < experts for row in kept for old in row):
            raise ValueError
        return kept, {}
    except (LookupError, TypeError, ValueError, AttributeError):
        raise InvalidInputError(
            f'{where}: expected {{"0": {{"<old>": <new>, ...}}, ...}} for {len(numbers)} layers, '
            f"old below {experts}, new counted from 0"
        ) from None
