"""Checks a checkpoint against a family's full description: every tensor present, with its shape and dtype."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from math import prod

from moe_surgery.checkpoint.checkpoint import INDEX_NAME, Checkpoint, TensorRef
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.text import describe_value, printable
from moe_surgery.errors import InvalidInputError
from moe_surgery.families.base import AnyFamily, Family, Layout, Role, StoredAs, Tensor
from moe_surgery.families.model_spec import ModelSpec, ModelTensor
from moe_surgery.formats.expert_format import FORMATS, MXFP4, ExpertFormat, format_of_dtype

__all__ = ["build_model_spec", "ignored_tensors"]

FLOATS = frozenset(f.dtype for f in FORMATS.values() if not f.packed)
# Saved by old versions of transformers and by TRL, not used by any model.
IGNORED_TENSORS = (
    (re.compile(r"(^|\.)rotary_emb\.inv_freq$"), "a buffer computed from config.json"),
    (re.compile(r"^v_head\."), "a value head of TRL"),
)
MAX_EXPERTS = 1024
MAX_LAYERS = 10_000
PER_LAYER = ("per_layer_config", "block_configs")
"""Config keys of transformers, and of NVIDIA's Puzzle models, for settings that differ by layer."""


def build_model_spec(checkpoint: Checkpoint, families: tuple[AnyFamily, ...]) -> ModelSpec:
    """Recognise `checkpoint` as one of `families` with a full description, and check all of it.

    Raises InvalidInputError for an unknown model type, a missing, surplus or misshapen tensor, and
    configuration that contradicts the tensors; one line, naming file and tensor.
    """
    family, layout = _recognise(checkpoint, families)
    dimensions, config_notes = _dimensions(checkpoint, family, layout)
    tensors: list[ModelTensor] = []
    used: set[str] = set()
    notes = [*config_notes, *checkpoint.notes]
    for layer, tensor in _expand(family, dimensions["layers"]):
        present = _is_present(tensor, checkpoint.config)
        if (
            not present
            and tensor.role is Role.UNEMBEDDING
            and layout.find(tensor.name).name in checkpoint.tensors
        ):
            present = True
            notes.append(
                f"{checkpoint.config_path}: ties the embeddings, but {tensor.name} is stored; the stored "
                "tensor is used, as in transformers"
            )
        if present:
            tensors.append(_resolve_tensor(checkpoint, layout, tensor, layer, dimensions, used))
    surplus = sorted(set(checkpoint.tensors) - used)
    ignored, note = ignored_tensors(checkpoint, surplus)
    notes.extend(note)
    if surplus := [name for name in surplus if name not in ignored]:
        raise InvalidInputError(
            f"{checkpoint.where(surplus[0])}: is not part of a {family.model_type} model of {dimensions['layers']} "
            f"layers (unexpected tensors: {len(surplus)}); {checkpoint.config_path} and the shards disagree"
        )
    stored = {t.format: t for t in tensors if t.format is not None}
    if len(stored) > 1:
        (one, first), (other, second) = list(stored.items())[:2]
        raise InvalidInputError(
            f"{checkpoint.where(first.stored.name)} is stored as {one.label}, "
            f"{checkpoint.where(second.stored.name)} as {other.label}: all expert weights must have the same format"
        )
    expert_format = next(iter(stored))
    return ModelSpec(
        family, layout, checkpoint.config, dimensions, tuple(tensors), expert_format, tuple(notes)
    )


def ignored_tensors(checkpoint: Checkpoint, names: Iterable[str]) -> tuple[set[str], list[str]]:
    """Those of `names` that no model uses, and a note on them if there are any."""
    ignored = {n: why for n in names for pattern, why in IGNORED_TENSORS if pattern.search(n)}
    if not ignored:
        return set(), []
    count = "1 tensor is" if len(ignored) == 1 else f"{len(ignored)} tensors are"
    example = next(iter(ignored))
    return set(ignored), [
        f"{printable_path(checkpoint.path)}: {count} ignored, as in transformers: {printable(example)} "
        f"({ignored[example]})"
    ]


def _recognise(checkpoint: Checkpoint, families: tuple[AnyFamily, ...]) -> tuple[Family, Layout]:
    model_type = checkpoint.config.get("model_type")
    for family in (f for f in families if isinstance(f, Family)):
        if model_type is not None and model_type != family.model_type:
            continue
        for layout in family.layouts:
            first = layout.find(family.tensors[0].name).name
            if first in checkpoint.tensors:
                return family, layout
        if model_type == family.model_type:
            raise InvalidInputError(
                f"{checkpoint.path}: tensor {family.tensors[0].name!r} is missing from this "
                f"{family.title} checkpoint; a file is missing, or it was saved without the tensor"
            )
    from moe_surgery.families.unsupported import supported_types

    raise InvalidInputError(
        f"{checkpoint.config_path}: unsupported model_type {describe_value(model_type)} "
        f"(supported: {supported_types(families)})"
    )


def _dimensions(
    checkpoint: Checkpoint, family: Family, layout: Layout
) -> tuple[dict[str, int], tuple[str, ...]]:
    """The dimensions in config.json, and a note for each that it gives twice with different values."""
    dimensions: dict[str, int] = {}
    notes: list[str] = []
    for name in PER_LAYER:
        if checkpoint.config.get(name):
            raise InvalidInputError(
                f"{checkpoint.config_path}: {name} configures layers individually, which is not supported"
            )
    for dimension, key in {**family.dimensions, **layout.dimensions}.items():
        values: dict[str, object] = {k: _positive(checkpoint, k) for k in key.keys if k in checkpoint.config}
        used = next(iter(values), None)
        if used is None and key.default is None:
            names = " or ".join(map(repr, key.keys))
            raise InvalidInputError(f"{checkpoint.config_path}: key {names} is missing")
        value = key.default if used is None else values[used]
        assert isinstance(value, int)
        dimensions[dimension] = value
        values |= {k: checkpoint.config[k] for k in key.unread if k in checkpoint.config}
        others = " and ".join(f"{k} is {describe_value(v)}" for k, v in values.items() if v != value)
        if used is None and key.unread:
            others = f"{others}, " if others else ""
            notes.append(
                f"{checkpoint.config_path}: {others}{key.keys[0]} is missing; {layout.reader} and moe-surgery use "
                f"{key.keys[0]} {value}"
            )
        elif others:
            notes.append(
                f"{checkpoint.config_path}: {used} is {value} but {others}; {layout.reader} and moe-surgery use "
                f"{used}"
            )
    for dimension, most in (("experts", MAX_EXPERTS), ("layers", MAX_LAYERS)):
        if dimensions[dimension] > most:
            raise InvalidInputError(
                f"{checkpoint.config_path}: {dimensions[dimension]} {dimension}; at most {most} are supported"
            )
    if dimensions["top_k"] > dimensions["experts"]:
        raise InvalidInputError(
            f"{checkpoint.config_path}: top-k {dimensions['top_k']} is more than the {dimensions['experts']} experts"
        )
    return dimensions, tuple(notes)


def _positive(checkpoint: Checkpoint, key: str) -> int:
    value = checkpoint.config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidInputError(
            f"{checkpoint.config_path}: {key} is {describe_value(value)}, not a positive integer"
        )
    return value


def _expand(family: Family, layers: int) -> Iterator[tuple[int | None, Tensor]]:
    """The family's tensors in order, those between the first and last per-layer one once a layer."""
    per_layer = [t for t in family.tensors if t.per_layer]
    first = family.tensors.index(per_layer[0])
    yield from ((None, t) for t in family.tensors[:first])
    for layer in range(layers):
        yield from ((layer, t) for t in per_layer)
    yield from ((None, t) for t in family.tensors[first:] if not t.per_layer)


def _is_present(tensor: Tensor, config: Mapping[str, object]) -> bool:
    if tensor.present_if is None:
        return True
    key, default = tensor.present_if
    if key.startswith("!"):
        return not config.get(key[1:], not default)
    return bool(config.get(key, default))


def _evaluate(expression: str, dimensions: Mapping[str, int]) -> int:
    """The value of a sum of products of dimension names and numbers, such as "2*kv_heads*head_dim"."""
    return sum(
        prod(int(f) if f.isdigit() else dimensions[f] for f in term.split("*"))
        for term in expression.split("+")
    )


def _resolve_tensor(
    checkpoint: Checkpoint,
    layout: Layout,
    tensor: Tensor,
    layer: int | None,
    dimensions: Mapping[str, int],
    used: set[str],
) -> ModelTensor:
    shape = tuple(_evaluate(e, dimensions) for e in tensor.shape)
    where = layout.find(tensor.name)
    where = where._replace(name=where.name.replace("{layer}", str(layer)))
    name = tensor.name.replace("{layer}", str(layer))
    scales: TensorRef | None = None
    expert_format: ExpertFormat | None = None
    stored: TensorRef
    if tensor.role is Role.EXPERT_WEIGHT:
        expert_format, stored, scales = _find_expert_weight(checkpoint, layout, where.name, shape)
    else:
        stored = _find_dense_tensor(checkpoint, where, shape, dimensions)
    used.update(ref.name for ref in (stored, scales) if ref)
    return ModelTensor(name, tensor.role, layer, shape, stored, scales, expert_format)


def _find_dense_tensor(
    checkpoint: Checkpoint, where: StoredAs, shape: tuple[int, ...], dimensions: Mapping[str, int]
) -> TensorRef:
    ref = _get(checkpoint, where.name)
    whole = shape if not where.rows else (_evaluate(where.rows, dimensions), *shape[1:])
    _expect(checkpoint, ref, whole, FLOATS)
    return ref if not where.rows else ref.rows(_evaluate(where.start, dimensions), shape[0])


def _find_expert_weight(
    checkpoint: Checkpoint, layout: Layout, name: str, shape: tuple[int, ...]
) -> tuple[ExpertFormat, TensorRef, TensorRef | None]:
    """MXFP4 blocks with their scales, or a dense tensor: distinguished by dtype and by the scales.

    (transformers saves a dequantised model's dense weights under the name of the blocks.)
    """
    experts, rows, columns = shape
    blocks = checkpoint.tensors.get(name + layout.blocks)
    if blocks is not None and (blocks.dtype == "U8" or name + layout.scales in checkpoint.tensors):
        if not MXFP4.fits_columns(columns):
            raise InvalidInputError(
                f"{checkpoint.where(blocks.name)}: {columns} columns are not a multiple of the MXFP4 block size 32"
            )
        scales = _get(checkpoint, name + layout.scales)
        for part, tensor in zip((blocks, scales), MXFP4.tensors(rows, columns), strict=True):
            _expect(checkpoint, part, (experts, *tensor.shape), frozenset({tensor.dtype}))
        return MXFP4, blocks, scales
    ref = blocks if blocks is not None else checkpoint.tensors.get(name)
    if ref is None:
        ref = _get(checkpoint, name + layout.blocks)
    _expect(checkpoint, ref, (experts, columns, rows), FLOATS)
    dense = format_of_dtype(ref.dtype)
    assert dense is not None
    return dense, ref, None


def _get(checkpoint: Checkpoint, name: str) -> TensorRef:
    ref = checkpoint.tensors.get(name)
    if ref is None:
        reason = (
            f"{INDEX_NAME} does not list it either: the checkpoint was saved without it"
            if checkpoint.index is not None
            else "a file is missing, or the checkpoint was saved without it"
        )
        raise InvalidInputError(f"{checkpoint.path}: tensor {name!r} is missing; {reason}")
    return ref


def _expect(checkpoint: Checkpoint, ref: TensorRef, shape: tuple[int, ...], dtypes: frozenset[str]) -> None:
    if ref.dtype not in dtypes:
        raise InvalidInputError(
            f"{checkpoint.where(ref.name)}: dtype {ref.dtype}, expected {' or '.join(sorted(dtypes))}"
        )
    if ref.shape != shape:
        raise InvalidInputError(
            f"{checkpoint.where(ref.name)}: shape {list(ref.shape)}, expected {list(shape)} "
            f"from {checkpoint.config_path.name}"
        )
