"""What the metadata of a GGUF model says about its experts, read as strictly as llama.cpp does."""

from __future__ import annotations

from dataclasses import dataclass

from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.gguf.header import ValueType
from moe_surgery.checkpoint.gguf.model_file import GgufModel
from moe_surgery.checkpoint.text import describe_value, printable
from moe_surgery.errors import InvalidInputError
from moe_surgery.families.gguf.architectures import GATING, Architecture, architecture_of
from moe_surgery.families.grouping import Grouping

__all__ = ["Counts", "read_counts"]

GROUP_MINIMUM = 2
"""Experts of a group: llama.cpp scores each by its best two, whatever the model."""


@dataclass(frozen=True, slots=True)
class Counts:
    """`blocks` includes the `mtp` last ones for multi-token prediction; `top_k_by_block` is empty where
    `top_k` is one number. `experts_per_group` is grovemoe's, 1 for others. `minimum` as in `ModelSpec`."""

    architecture: Architecture
    experts: int
    top_k: int
    top_k_by_block: tuple[int, ...]
    blocks: int
    mtp: int
    grouping: Grouping | None
    minimum: int
    experts_per_group: int
    routing: str


def read_counts(model: GgufModel) -> Counts:
    """The counts of `model`.

    Raises InvalidInputError, one line naming the key, for a file that is not a model, a model without experts, and
    values that llama.cpp refuses or aborts on.
    """
    where = printable_path(model.path)
    kind = model.value("general.type")
    if kind == "imatrix":
        raise InvalidInputError(f"{where}: is an importance matrix, not a model")
    if kind not in (None, "model"):
        raise InvalidInputError(
            f"{where}: holds a part of a model ({describe_value(kind)}); pass the file of the model itself"
        )
    name = model.value("general.architecture")
    if not isinstance(name, str) or not name:
        raise InvalidInputError(f"{where}: has no general.architecture, so llama.cpp cannot run it")
    architecture = architecture_of(name)
    blocks = _u32(model, f"{name}.block_count")
    experts = _u32(model, f"{name}.expert_count", 0)
    if experts == 0:
        raise InvalidInputError(
            f"{where}: has no experts ({printable(name)}.expert_count): a dense model, nothing to prune"
        )
    key = f"{name}.expert_used_count"
    top_k, by_block = _top_k(model, architecture, key, blocks)
    if not 1 <= top_k <= experts:
        raise InvalidInputError(
            f"{where}: key '{printable(key)}' is {top_k}, but there are {experts} experts"
        )
    mtp = _u32(model, f"{name}.nextn_predict_layers", 0)
    if mtp >= blocks:
        raise InvalidInputError(
            f"{where}: key '{printable(name)}.nextn_predict_layers' is {mtp}, but there are {blocks} blocks"
        )
    groups = _u32(model, f"{name}.expert_group_count", 0)
    gating = _u32(model, f"{name}.expert_gating_func", 0)
    return Counts(
        architecture,
        experts,
        top_k,
        by_block,
        blocks,
        mtp,
        _grouping(model, name, experts, groups),
        2 if groups == 1 else 1,  # llama.cpp wants more experts than groups
        _u32(model, f"{name}.experts_per_group", 1),
        GATING.get(gating, f"gating function {gating}"),
    )


def _grouping(model: GgufModel, name: str, experts: int, groups: int) -> Grouping | None:
    if groups <= 1:
        return None
    used = _u32(model, f"{name}.expert_group_used_count", 0)
    if experts % groups or not 0 < used < groups:
        raise InvalidInputError(
            f"{printable_path(model.path)}: {experts} experts in {groups} groups of which a token uses {used} "
            f"({printable(name)}.expert_group_count, expert_group_used_count): llama.cpp aborts on that"
        )
    return Grouping(experts, groups, used, GROUP_MINIMUM)


def _top_k(
    model: GgufModel, architecture: Architecture, key: str, blocks: int
) -> tuple[int, tuple[int, ...]]:
    """The most experts a token, and those of each block where they are listed."""
    entry = model.metadata.get(key)
    if entry is None or entry.type != ValueType.ARRAY:
        return _u32(model, key), ()
    values = model.value(key)
    assert isinstance(values, list)
    if entry.item_type not in (ValueType.U32, ValueType.I32) or len(values) != blocks:
        raise InvalidInputError(
            f"{printable_path(model.path)}: key '{printable(key)}' is not one number for each of {blocks} blocks"
        )
    by_block = tuple(values)
    return (max(by_block) if architecture.top_k_per_layer else by_block[0]), by_block


def _u32(model: GgufModel, key: str, default: int | None = None) -> int:
    entry = model.metadata.get(key)
    where = printable_path(model.path)
    if entry is None:
        if default is None:
            raise InvalidInputError(f"{where}: key '{printable(key)}' is missing")
        return default
    if entry.type != ValueType.U32:
        raise InvalidInputError(f"{where}: key '{printable(key)}' is not a u32, which llama.cpp needs")
    value = model.value(key)
    assert isinstance(value, int)
    return value
