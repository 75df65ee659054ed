"""Models to compare with the full one: plans as views, and pruned checkpoints."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from moe_surgery.checkpoint.files import printable_path, read_small_file
from moe_surgery.checkpoint.resolve import resolve
from moe_surgery.checkpoint.strict_json import parse_json
from moe_surgery.errors import InvalidInputError, PlanMismatchError
from moe_surgery.kernels.weights import Layer
from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.view import view_layer
from moe_surgery.surgery.manifest import is_ours, load_manifest
from moe_surgery.surgery.names import MANIFEST_NAME, MAPPING_NAME

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


def pruned_candidate(path: str, other: CausalLM, full: CausalLM) -> Candidate:
    """The checkpoint `other` at `path`; its source experts come from its manifest or expert mapping.

    Raises PlanMismatchError if it cannot be pruned from `full`.
    """
    a, b = other.config, full.config
    if (a.num_hidden_layers, a.vocab_size, a.hidden_size) != (
        b.num_hidden_layers,
        b.vocab_size,
        b.hidden_size,
    ):
        raise PlanMismatchError(
            f"{path}: has {a.num_hidden_layers} layers, hidden size {a.hidden_size}, vocabulary {a.vocab_size}; "
            f"the full model has {b.num_hidden_layers}, {b.hidden_size}, {b.vocab_size}"
        )
    kept, provenance = source_experts(path, a.num_hidden_layers, b.num_local_experts)
    if kept is not None and any(len(row) != a.num_local_experts for row in kept):
        raise InvalidInputError(
            f"{path}: its manifest or {MAPPING_NAME} does not list its {a.num_local_experts} experts"
        )
    return Candidate(path, kept, model=other, provenance=provenance)


def source_experts(
    checkpoint: str | os.PathLike[str], layers: int, experts: int
) -> tuple[tuple[tuple[int, ...], ...] | None, dict[str, object]]:
    """Source experts by layer and provenance of a checkpoint pruned from a model of that size, from our manifest or a
    published model's mapping; None for experts where there is neither, or it is of another model."""
    path = resolve(checkpoint)
    folder = path if path.is_dir() else path.parent
    if is_ours(folder):
        manifest = load_manifest(folder / MANIFEST_NAME)
        plan = manifest.plan
        fits = (plan.num_layers, plan.num_source_experts) == (layers, experts)
        return (plan.layers if fits else None), manifest.provenance
    mapping = folder / MAPPING_NAME
    if not mapping.is_file():
        return None, {}
    raw = read_small_file(mapping, limit=MAX_MAPPING_BYTES, what="an expert mapping")
    parsed = parse_json(raw, where=printable_path(mapping))
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
            f'{printable_path(mapping)}: expected {{"0": {{"<old>": <new>, ...}}, ...}} for {layers} layers, '
            f"old below {experts}, new counted from 0"
        ) from None
