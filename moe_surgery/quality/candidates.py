"""Models to compare with the full one: plans as views, and pruned checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.source import Folder, read_optional
from moe_surgery.checkpoint.strict_json import parse_json
from moe_surgery.errors import InvalidInputError, PlanMismatchError
from moe_surgery.kernels.weights import Layer
from moe_surgery.runtime.model import CausalLM
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
    model: CausalLM | None = None
    provenance: dict[str, object] = field(default_factory=dict)

    def layer(self, number: int, full: Layer) -> Layer:
        """The candidate's layer, sharing weights with `full` for a view."""
        if self.model is not None:
            return self.model.layers[number]
        assert self.kept is not None
        return view_layer(full, self.kept[number], self.top_k)


def pruned_candidate(name: str, files: Folder, other: CausalLM, full: CausalLM) -> Candidate:
    """The checkpoint in `files`, loaded as `other`; its source experts come from its manifest or expert mapping.

    Raises PlanMismatchError if it cannot be pruned from `full`, InvalidInputError for a mapping that does not
    fit, and as `find_manifest`.
    """
    a, b = other.config, full.config
    if (a.num_hidden_layers, a.vocab_size, a.hidden_size) != (
        b.num_hidden_layers,
        b.vocab_size,
        b.hidden_size,
    ):
        raise PlanMismatchError(
            f"{name}: has {a.num_hidden_layers} layers, hidden size {a.hidden_size}, vocabulary {a.vocab_size}; "
            f"the full model has {b.num_hidden_layers}, {b.hidden_size}, {b.vocab_size}"
        )
    kept, provenance = source_experts(files, a.num_hidden_layers, b.num_local_experts)
    if kept is not None and any(len(row) != a.num_local_experts for row in kept):
        raise InvalidInputError(
            f"{name}: its manifest or {MAPPING_NAME} does not list its {a.num_local_experts} experts"
        )
    return Candidate(name, kept, model=other, provenance=provenance)


def source_experts(
    files: Folder, layers: int, experts: int
) -> tuple[tuple[tuple[int, ...], ...] | None, dict[str, object]]:
    """Source experts by layer and provenance of the checkpoint in `files`, pruned from a model of that size.

    From our manifest or a published model's mapping; None for experts where there is neither, or it is of another
    model.
    """
    manifest = find_manifest(files)
    if manifest is not None:
        plan = manifest.plan
        fits = (plan.num_layers, plan.num_source_experts) == (layers, experts)
        return (plan.layers if fits else None), manifest.provenance
    raw = read_optional(files, MAPPING_NAME, limit=MAX_MAPPING_BYTES, what="an expert mapping")
    if raw is None:
        return None, {}
    where = printable_path(files.path / MAPPING_NAME)
    parsed = parse_json(raw, where=where)
    try:
        rows = [parsed[str(number)] for number in range(layers)]  # type: ignore[index]
        kept = tuple(tuple(int(old) for old in sorted(row, key=row.__getitem__)) for row in rows)
        if any(set(row.values()) != set(range(len(row))) for row in rows):
            raise ValueError
        if any(not 0 <= old < experts for row in kept for old in row):
            raise ValueError
        return kept, {}
    except (LookupError, TypeError, ValueError, AttributeError):
        raise InvalidInputError(
            f'{where}: expected {{"0": {{"<old>": <new>, ...}}, ...}} for {layers} layers, '
            f"old below {experts}, new counted from 0"
        ) from None
