"""What a pruned GGUF file says about itself: the keys that `metadata` adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.gguf.model_file import GgufModel
from moe_surgery.errors import InvalidInputError
from moe_surgery.surgery.gguf.metadata import BLOCKS_KEY, KEPT_KEY, OWN, TOP_K_KEY

__all__ = ["Kept", "own_keys"]


@dataclass(frozen=True, slots=True)
class Kept:
    """The source experts that each block kept, of how many, and the top-k that the plan set (None: the source's)."""

    experts: int
    rows: Mapping[int, tuple[int, ...]]
    top_k: int | None


def own_keys(model: GgufModel) -> Kept | None:
    """The keys of `model`; None where it was not pruned by this package. Raises InvalidInputError for damaged ones."""
    if KEPT_KEY not in model.metadata:
        return None
    where = printable_path(model.path)
    blocks, kept = model.value(BLOCKS_KEY), model.value(KEPT_KEY)
    experts, top_k = model.value(OWN + "source.expert_count"), model.value(TOP_K_KEY)
    if (
        not isinstance(experts, int)
        or not isinstance(top_k, int | None)
        or not _are_numbers(blocks)
        or not _are_numbers(kept)
    ):
        raise InvalidInputError(f"{where}: keys {OWN}*: are not those that moe-surgery writes")
    assert isinstance(blocks, list)
    assert isinstance(kept, list)
    each, rest = divmod(len(kept), len(blocks)) if blocks else (0, 1)
    rows = {block: tuple(kept[i * each : (i + 1) * each]) for i, block in enumerate(blocks)}
    if (
        rest
        or len(rows) != len(blocks)
        or any(len(set(row)) != each or max(row) >= experts for row in rows.values())
    ):
        raise InvalidInputError(
            f"{where}: key '{KEPT_KEY}' does not list distinct experts of {experts} for each of {len(blocks)} blocks"
        )
    return Kept(experts, rows, top_k)


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int and item >= 0 for item in value)
