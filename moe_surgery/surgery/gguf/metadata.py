"""The metadata of a pruned GGUF file: the source's bytes, but for the keys that count experts or name files.

Nothing is parsed that need not be: a vocabulary of 150,000 tokens is copied like a weight.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import Final

import xxhash

from moe_surgery.checkpoint.gguf.header import ALIGNMENT_KEY, KeyValue, ValueType
from moe_surgery.checkpoint.gguf.model_file import (
    SPLIT_COUNT,
    SPLIT_NUMBER,
    SPLIT_TENSORS,
    GgufModel,
    GgufShard,
)
from moe_surgery.checkpoint.gguf.writer import Metadata
from moe_surgery.engine.spans import Copy, Literal, Span
from moe_surgery.errors import PlanMismatchError
from moe_surgery.families.base import GgufFamily, Role
from moe_surgery.families.gguf import architecture_of
from moe_surgery.families.model_spec import ModelSpec
from moe_surgery.selection.plan import Plan
from moe_surgery.surgery.gguf.program import GgufPart
from moe_surgery.version import __version__

__all__ = [
    "BLOCKS_KEY",
    "KEPT_KEY",
    "OWN",
    "SPLIT_KEYS",
    "TOP_K_KEY",
    "edited_metadata",
    "source_digest",
    "split_keys",
    "structure_digest",
]

OWN: Final = "moe_surgery."
"""Begins the keys that a pruned file gains: which experts it has, and of which file."""
KEPT_KEY: Final = OWN + "kept_experts"
BLOCKS_KEY: Final = OWN + "blocks"
TOP_K_KEY: Final = OWN + "plan.top_k"
SPLIT_KEYS: Final = (SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS)
_NOT_PER_BLOCK: Final = (".rope.dimension_sections",)
"""Ends of keys whose lists may happen to be as long as there are blocks."""
_ROUTER_BYTES: Final = 1 << 20
_COUNTED_LABEL: Final = re.compile(r"([0-9]+)(x.+)")

Parts = tuple[GgufPart, ...]


def edited_metadata(
    model: GgufModel, spec: ModelSpec, plan: Plan, top_k: int, digest: str
) -> dict[str, Parts]:
    """Every key of the output with its bytes (key, type and value), in order, without those of splits.

    `plan` has been checked and has the experts of MTP blocks, or none where they are dropped. Raises
    PlanMismatchError where an expert's width would have to be added but is not one number.
    """
    name = _architecture(spec)
    kept = len(plan.layers[0])
    dropped = plan.mtp_layers == () and spec.dimensions["mtp_blocks"] > 0
    changed = _without_mtp(model, spec, name) if dropped else {}
    changed |= _counts(model, spec, name, kept, plan, top_k)
    keys: dict[str, Parts] = {}
    for key, entry in model.metadata.items():
        if key in SPLIT_KEYS or key.startswith(OWN):
            continue
        parts = changed.get(key, (Copy(Span(model.name, entry.offset, entry.nbytes)),))
        if parts:
            keys[key] = parts
    if f"{name}.expert_feed_forward_length" not in model.metadata and top_k != spec.top_k:
        keys |= _width(spec, name)
    return keys | _own(model, spec, plan, digest)


def split_keys(number: int, count: int, tensors: int) -> dict[str, Parts]:
    """Those of file `number` (from 0) of `count`; `tensors` are those of all files."""
    keys: dict[str, Parts] = {}
    for key, kind, code, value in (
        (SPLIT_NUMBER, ValueType.U16, "H", number),
        (SPLIT_COUNT, ValueType.U16, "H", count),
        (SPLIT_TENSORS, ValueType.I32, "i", tensors),
    ):
        keys[key] = (Literal(_key(key) + struct.pack(f"<I{code}", kind, value)),)
    return keys


def alignment_key(model: GgufModel) -> dict[str, Parts]:
    """The key of the alignment, for later files of a set; none where it is the default."""
    entry = model.metadata.get(ALIGNMENT_KEY)
    return {} if entry is None else {entry.key: (Copy(Span(model.name, entry.offset, entry.nbytes)),)}


def structure_digest(shard: GgufShard) -> str:
    """xxh3_128 of a file's tensor table, and of where each key lies; not of weights or values."""
    digest = xxhash.xxh3_128()
    for entry in shard.header.metadata.values():
        digest.update(repr((entry.key, entry.type, entry.item_type, entry.count, entry.offset)).encode())
    for info in shard.header.tensors.values():
        digest.update(repr((info.name, info.type.number, info.shape, info.offset)).encode())
    return digest.hexdigest()


def source_digest(model: GgufModel, spec: ModelSpec) -> str:
    """Identifies the files of `model`: xxh3_128 of their structure and of the first MiB of a router's weights."""
    digest = xxhash.xxh3_128()
    for shard in model.shards.values():
        digest.update(structure_digest(shard).encode())
    router = next(t.stored for t in spec.tensors if t.role is Role.ROUTER)
    digest.update(model.shards[router.shard].source.read(router.offset, min(router.nbytes, _ROUTER_BYTES)))
    return digest.hexdigest()


def _architecture(spec: ModelSpec) -> str:
    assert isinstance(spec.family, GgufFamily)
    return spec.family.architecture


def _counts(
    model: GgufModel, spec: ModelSpec, name: str, kept: int, plan: Plan, top_k: int
) -> dict[str, Parts]:
    changed: dict[str, Parts] = {}
    if kept != spec.experts:
        changed |= _u32(f"{name}.expert_count", kept)
        changed |= _size_label(model, spec.experts, kept)
    key = f"{name}.expert_used_count"
    entry = model.metadata[key]
    if entry.type != ValueType.ARRAY:
        if top_k != spec.top_k:
            changed |= _u32(key, top_k)
        return changed
    values = model.value(key)
    assert isinstance(values, list)
    if plan.mtp_layers == ():
        values = values[: spec.dimensions["hidden_layers"]]
    limit = [v if v == 0 else top_k if plan.top_k is not None else min(v, kept) for v in values]
    if limit != values:
        packed = Metadata()
        (packed.u32s if entry.item_type == ValueType.U32 else packed.i32s)(key, limit)
        changed[key] = (Literal(bytes(packed.packed)),)
    return changed


def _size_label(model: GgufModel, experts: int, kept: int) -> dict[str, Parts]:
    """`8x7B` becomes `4x7B`; any other label is of the whole model, and dropped."""
    key = "general.size_label"
    label = model.value(key)
    if label is None:
        return {}
    counted = _COUNTED_LABEL.fullmatch(label) if isinstance(label, str) else None
    if counted is None or int(counted[1]) != experts:
        return {key: ()}
    packed = Metadata()
    packed.text(key, f"{kept}{counted[2]}")
    return {key: (Literal(bytes(packed.packed)),)}


def _without_mtp(model: GgufModel, spec: ModelSpec, name: str) -> dict[str, Parts]:
    """Fewer blocks: their number, that of MTP blocks, and all arrays with an entry a block."""
    dropped = spec.dimensions["mtp_blocks"]
    left = spec.dimensions["hidden_layers"]
    changed = _u32(f"{name}.block_count", left) | _u32(f"{name}.nextn_predict_layers", 0)
    for key, entry in model.metadata.items():
        per_block = entry.type == ValueType.ARRAY and entry.count == left + dropped
        if not key.startswith(f"{name}.") or key.endswith(_NOT_PER_BLOCK):
            continue
        if per_block and entry.item_type != ValueType.STRING:
            changed[key] = _shortened(model, entry, left)
    return changed


def _shortened(model: GgufModel, entry: KeyValue, count: int) -> Parts:
    """The first `count` items of an array of numbers."""
    head = _key(entry.key) + struct.pack("<IIQ", ValueType.ARRAY, entry.item_type, count)
    step = (entry.end - entry.value) // entry.count
    return Literal(head), Copy(Span(model.name, entry.value, count * step))


def _width(spec: ModelSpec, name: str) -> dict[str, Parts]:
    """The width of an expert, where llama.cpp would derive it from the top-k that changes."""
    if not architecture_of(name).width_from_top_k:
        return {}
    key = f"{name}.expert_feed_forward_length"
    widths = {t.shape[-1] for t in spec.tensors if t.name.endswith(".ffn_down_exps.weight")}
    if len(widths) != 1:
        raise PlanMismatchError(
            f"experts have {len(widths)} widths, and llama.cpp derives the width from the top-k, as the file has no "
            f"{key}: leave the top-k as it is"
        )
    return _u32(key, widths.pop())


def _own(model: GgufModel, spec: ModelSpec, plan: Plan, digest: str) -> dict[str, Parts]:
    mtp = spec.mtp_layers if plan.mtp_layers else ()
    blocks = [*plan.numbers, *(int(layer.removeprefix("blk.")) for layer in mtp)]
    rows = [*plan.layers, *(plan.mtp_layers or ())]
    packed = Metadata()
    keys: dict[str, Parts] = {}

    def add() -> None:
        keys[packed.keys[-1]] = (Literal(bytes(packed.packed)),)
        packed.packed.clear()

    packed.text(OWN + "version", __version__)
    add()
    packed.text(OWN + "source.name", model.name.encode("utf-8", "replace").decode())
    add()
    packed.text(OWN + "source.digest", digest)
    add()
    packed.u32(OWN + "source.expert_count", spec.experts)
    add()
    if plan.top_k is not None:
        packed.u32(TOP_K_KEY, plan.top_k)
        add()
    packed.u32s(BLOCKS_KEY, blocks)
    add()
    packed.u32s(KEPT_KEY, [expert for row in rows for expert in row])
    add()
    return keys


def _u32(key: str, value: int) -> dict[str, Parts]:
    packed = Metadata()
    packed.u32(key, value)
    return {key: (Literal(bytes(packed.packed)),)}


def _key(key: str) -> bytes:
    raw = key.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def bytes_of(keys: Mapping[str, Parts]) -> list[GgufPart]:
    """The parts of all keys, in order."""
    return [part for parts in keys.values() for part in parts]
