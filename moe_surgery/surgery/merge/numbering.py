"""Which expert of a pruned checkpoint an adapter means that was made for its source."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.source import read_small
from moe_surgery.checkpoint.strict_json import parse_json
from moe_surgery.errors import InvalidInputError, PlanMismatchError, UsageError
from moe_surgery.families.model_spec import ModelSpec
from moe_surgery.surgery.manifest import load_manifest
from moe_surgery.surgery.names import MANIFEST_NAME, MAPPING_NAME

__all__ = ["NUMBERINGS", "Numbering", "choose_numbering", "read_mapping"]

NUMBERINGS: Final = ("auto", "checkpoint", "source")
"""What `numbering` may be."""
MAX_MAPPING_BYTES: Final = 100_000_000


@dataclass(frozen=True, slots=True)
class Numbering:
    """`kept[row]` lists the adapter's number of each expert of MoE layer `row` of the checkpoint, of `experts`
    that the adapter was made for."""

    name: str
    experts: int
    kept: tuple[tuple[int, ...], ...]

    @property
    def same(self) -> bool:
        return all(row == tuple(range(self.experts)) for row in self.kept)


def choose_numbering(
    checkpoint: Checkpoint,
    model: ModelSpec,
    numbering: str,
    counts: Collection[int],
    numbers: Collection[int],
    where: str,
) -> Numbering:
    """The numbering of an adapter `where` whose stacked tensors have `counts` experts and whose other tensors
    name experts `numbers`.

    "source" is that of the checkpoint which this one was pruned from, "checkpoint" its own, "auto" the one that
    fits. Raises UsageError where both do, PlanMismatchError where none does.
    """
    if numbering not in NUMBERINGS:
        raise UsageError(f"`numbering` {numbering}: choose one of {', '.join(NUMBERINGS)}")
    own = Numbering("checkpoint", model.experts, (tuple(range(model.experts)),) * model.layers)
    found = _source_numbers(checkpoint, model)
    if found is None:
        if numbering == "source":
            raise UsageError(
                f"`numbering` source: {printable_path(checkpoint.path)} has neither {MAPPING_NAME} nor "
                f"{MANIFEST_NAME}, so the experts' numbers in its source are not known"
            )
        return _fitting([own], counts, numbers, model, where)
    kept, experts = found
    highest = max(max(row) for row in kept) + 1
    size = experts or max(highest, *counts, *(n + 1 for n in numbers))
    source = Numbering("source", size, kept)
    if source.same and size == model.experts:
        return _fitting([own], counts, numbers, model, where)
    candidates = {"checkpoint": [own], "source": [source]}.get(numbering, [own, source])
    return _fitting(candidates, counts, numbers, model, where)


def _fitting(
    candidates: Sequence[Numbering],
    counts: Collection[int],
    numbers: Collection[int],
    model: ModelSpec,
    where: str,
) -> Numbering:
    if not counts and not numbers:
        return candidates[0]  # nothing depends on it
    fits = [
        c
        for c in candidates
        if all(count == c.experts for count in counts) and all(number < c.experts for number in numbers)
    ]
    if len(fits) == 2 and not counts and set(numbers) == set(range(model.experts)):
        return fits[0]  # an adapter of the larger model would have more
    if len(fits) == 1:
        return fits[0]
    shown = f"{', '.join(map(str, sorted(counts)))} experts" if counts else f"experts up to {max(numbers)}"
    if not fits:
        raise PlanMismatchError(
            f"{where}: was made for {shown}, the checkpoint has {model.experts}"
            + (f" of {candidates[-1].experts}" if candidates[-1].name == "source" else "")
            + "; it is an adapter of another model, or of the source of a checkpoint whose expert_mapping.json is "
            "missing"
        )
    raise UsageError(
        f"{where}: {shown} may be numbered as in the checkpoint or as in its source; choose with `numbering` "
        "(checkpoint or source)"
    )


def _source_numbers(
    checkpoint: Checkpoint, model: ModelSpec
) -> tuple[tuple[tuple[int, ...], ...], int | None] | None:
    """The source's number of each expert by layer, and how many experts it had where that is recorded."""
    mapping, folder = read_mapping(checkpoint), checkpoint.files.on_disk
    kept = None
    if mapping is not None:
        kept = _parsed(mapping, model, f"{printable_path(checkpoint.path)}/{MAPPING_NAME}")
    if folder is None or not checkpoint.files.is_file(MANIFEST_NAME):
        return None if kept is None else (kept, None)
    plan = load_manifest(Path(folder) / MANIFEST_NAME).plan
    if kept is not None:
        return kept, plan.num_source_experts if plan.layers == kept else None
    if plan.num_layers != model.layers or plan.uniform_experts != model.experts:
        raise InvalidInputError(
            f"{printable_path(folder / MANIFEST_NAME)}: its plan does not match the weights; run moe-surgery verify"
        )
    return plan.layers, plan.num_source_experts


def read_mapping(checkpoint: Checkpoint) -> bytes | None:
    """expert_mapping.json of the checkpoint, None where there is none."""
    if not checkpoint.files.is_file(MAPPING_NAME):
        return None
    with checkpoint.files.open(MAPPING_NAME) as source:
        return read_small(source, limit=MAX_MAPPING_BYTES, what="an expert mapping")


def _parsed(raw: bytes, model: ModelSpec, where: str) -> tuple[tuple[int, ...], ...]:
    root = parse_json(raw, where=where)
    rows = []
    for number in model.layer_numbers:
        row = root.get(str(number)) if isinstance(root, Mapping) else None
        numbers = row if isinstance(row, Mapping) else {}
        order = {
            new: int(old)
            for old, new in numbers.items()
            if type(new) is int and old.isascii() and old.isdigit()
        }
        if len(order) != len(numbers) or sorted(order) != list(range(model.experts)):
            raise InvalidInputError(
                f"{where}: layer {number} does not map {model.experts} experts to 0 to {model.experts - 1}"
            )
        rows.append(tuple(order[new] for new in range(model.experts)))
    return tuple(rows)
