"""Adapter x checkpoint -> `Program`: the checkpoint with all its experts, and the adapter's updates added."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from moe_surgery.checkpoint.checkpoint import Checkpoint, TensorRef
from moe_surgery.checkpoint.hub import is_hub_id
from moe_surgery.checkpoint.text import printable
from moe_surgery.engine.spans import Copy, Span, coalesce
from moe_surgery.errors import InvalidInputError, UsageError
from moe_surgery.families.base import CatalogFamily, Role
from moe_surgery.families.model_spec import EXPERT, ModelSpec, ModelTensor
from moe_surgery.formats.expert_format import ExpertFormat, format_of_dtype
from moe_surgery.selection.plan import plan_keeping
from moe_surgery.surgery.compiler import compile_program, converted, expert_span, whole_span
from moe_surgery.surgery.merge.adapter import Adapter
from moe_surgery.surgery.merge.numbering import read_mapping
from moe_surgery.surgery.merge.updates import RANK_ORDERS, Changes, find_changes
from moe_surgery.surgery.names import MAPPING_NAME
from moe_surgery.surgery.program import AddLowRank, Cast, OutputTensor, Part, Program, Update

__all__ = ["ADAPTER_KEY", "MergeOptions", "merge_program"]

ADAPTER_KEY: Final = "adapter"
"""The manifest's entry on the adapter, in that of the source."""


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """How an adapter is read: whose numbers its experts have (`NUMBERINGS`), and how the ranks of stacked second
    factors are ordered (`RANK_ORDERS`)."""

    numbering: str = "auto"
    rank_order: str = "peft"


def merge_program(
    checkpoint: Checkpoint,
    model: ModelSpec,
    adapter: Adapter,
    options: MergeOptions,
    *,
    store: str = "keep",
    max_shard_size: int,
) -> tuple[Program, Changes]:
    """The program that writes `checkpoint` with `adapter` merged, and what the adapter changes.

    Its entry on the adapter is in `Program.origin` under `ADAPTER_KEY`. `store` and `max_shard_size` as in
    `compile_program`. Reads the whole adapter, for its digest. Raises as `find_changes` and `compile_program`.
    """
    if options.rank_order not in RANK_ORDERS:
        raise UsageError(f"`rank_order` {options.rank_order}: choose one of {', '.join(RANK_ORDERS)}")
    changes = find_changes(
        checkpoint, model, adapter, numbering=options.numbering, rank_order=options.rank_order
    )
    if not changes.updates and not changes.saved:
        raise InvalidInputError(f"{adapter.where}: changes nothing in {checkpoint.path}")
    program = compile_program(
        checkpoint, model, plan_keeping(None, model), store=store, max_shard_size=max_shard_size
    )
    new = {t.name: t for t in _changed(checkpoint, model, adapter, changes, program.expert_format)}
    shards = tuple(replace(s, tensors=tuple(new.get(t.name, t) for t in s.tensors)) for s in program.shards)
    for tensor in (t for s in program.shards for t in s.tensors):
        changed = new.get(tensor.name)
        assert changed is None or (changed.dtype, changed.shape, changed.nbytes) == (
            tensor.dtype,
            tensor.shape,
            tensor.nbytes,
        )
    texts = dict(program.texts)
    if (mapping := read_mapping(checkpoint)) is not None:
        texts[MAPPING_NAME] = mapping  # the numbers in the checkpoint's own source stay known
    origin = {**program.origin, ADAPTER_KEY: _entry(adapter, changes, options, new)}
    return replace(program, shards=shards, texts=texts, origin=origin), changes


def _entry(
    adapter: Adapter, changes: Changes, options: MergeOptions, new: Mapping[str, OutputTensor]
) -> dict[str, object]:
    base = adapter.config.base_model
    return {
        "name": printable(adapter.name),
        "xxh3_128": adapter.digest(),
        "config_xxh3_128": adapter.config_digest,
        "base_model": base if base and is_hub_id(base) else None,
        "ranks": sorted({u.rank for updates in changes.updates.values() for u in updates}),
        "numbering": changes.numbering.name,
        "rank_order": options.rank_order,
        "tensors": sorted(new),
    }


def _changed(
    checkpoint: Checkpoint, model: ModelSpec, adapter: Adapter, changes: Changes, target: ExpertFormat
) -> Iterator[OutputTensor]:
    """The output tensors that differ from those of the checkpoint."""
    experts: dict[str, dict[int, tuple[Update, ...]]] = {}
    for (name, expert), updates in changes.updates.items():
        if expert is not None:
            experts.setdefault(name, {})[expert] = tuple(updates)
    for tensor in model.tensors:
        whole = tuple(changes.updates.get((tensor.name, None), ()))
        if tensor.name in changes.saved:
            saved = changes.saved[tensor.name]
            if whole and not tensor.role.has_experts:  # PEFT saves an embedding along with its update
                yield _updated(checkpoint, tensor, whole, saved, adapter.format_of(saved))
                continue
            if whole or tensor.name in experts:
                raise adapter.error(saved, f"replaces {tensor.name}, which the adapter also updates")
            numbers = None
            if tensor.layer is not None and tensor.role.has_experts:
                numbers = changes.numbering.kept[tensor.layer]
            yield from _replaced(checkpoint, adapter, tensor, saved.name, numbers, target)
        elif whole:
            yield _updated(checkpoint, tensor, whole, tensor.stored, _format(checkpoint, tensor))
        elif tensor.name in experts:
            yield from _with_experts(checkpoint, model, tensor, experts[tensor.name], target)


def _updated(
    checkpoint: Checkpoint,
    tensor: ModelTensor,
    updates: tuple[Update, ...],
    base: TensorRef,
    source: ExpertFormat,
) -> OutputTensor:
    """`base` in `source`, a matrix, or a vector as one column, with one update."""
    stored = _format(checkpoint, tensor)
    rows, columns = tensor.shape if len(tensor.shape) == 2 else (tensor.shape[0], 1)
    part = AddLowRank(whole_span(base), None, source, rows, columns, False, updates, stored, False, base.name)
    return OutputTensor(tensor.name, tensor.stored.dtype, tensor.shape, (part,))


def _format(checkpoint: Checkpoint, tensor: ModelTensor) -> ExpertFormat:
    stored = format_of_dtype(tensor.stored.dtype)
    if stored is None:
        raise InvalidInputError(
            f"{checkpoint.where(tensor.stored.name)}: is stored as {tensor.stored.dtype}, to which nothing can be "
            "added; dequantise the checkpoint first"
        )
    return stored


def _with_experts(
    checkpoint: Checkpoint,
    model: ModelSpec,
    tensor: ModelTensor,
    updates: Mapping[int, tuple[Update, ...]],
    target: ExpertFormat,
) -> Iterator[OutputTensor]:
    """A weight of experts: updated ones, and the others as they would be without an adapter."""
    if isinstance(model.family, CatalogFamily):
        stored = _format(checkpoint, tensor)
        rows, columns = tensor.shape[1:]

        def added(span: Span, expert: int) -> AddLowRank:
            return AddLowRank(
                span, None, stored, rows, columns, False, updates[expert], stored, False, tensor.stored.name
            )

        if tensor.pieces:
            for expert in updates:
                piece = tensor.pieces[expert]
                name = tensor.name.replace(EXPERT, str(expert))
                yield OutputTensor(name, piece.dtype, piece.shape, (added(whole_span(piece), expert),))
            return
        parts: list[Part] = []
        for expert in range(tensor.shape[0]):
            span = expert_span(tensor.stored, expert)
            parts.append(added(span, expert) if expert in updates else Copy(span))
        yield OutputTensor(tensor.name, tensor.stored.dtype, tensor.shape, _joined(parts))
        return
    experts, rows, columns = tensor.shape
    source = tensor.format
    assert source is not None
    for i, stored_tensor in enumerate(target.tensors(rows, columns)):
        parts = []
        for expert in range(experts):
            if expert not in updates:
                parts.append(_unchanged(tensor, expert, target, i))
                continue
            scales = None if tensor.scales is None else expert_span(tensor.scales, expert)
            parts.append(
                AddLowRank(
                    expert_span(tensor.stored, expert),
                    scales,
                    source,
                    rows,
                    columns,
                    True,
                    updates[expert],
                    target,
                    stored_tensor.suffix == "_scales",
                    tensor.stored.name,
                )
            )
        yield OutputTensor(
            tensor.name + stored_tensor.suffix,
            stored_tensor.dtype,
            (experts, *stored_tensor.shape),
            _joined(parts),
        )


def _unchanged(tensor: ModelTensor, expert: int, target: ExpertFormat, index: int) -> Part:
    """One expert's part of the `index`th tensor of a weight in `target`."""
    if tensor.format == target:
        refs = [ref for ref in (tensor.stored, tensor.scales) if ref is not None]
        return Copy(expert_span(refs[index], expert))
    (part,) = tuple(converted(tensor, (expert,), target))[index]
    return part


def _joined(parts: list[Part]) -> tuple[Part, ...]:
    """Copies that follow one another in the source as one."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, Copy) and isinstance(last, Copy):
            joined[-1:] = map(Copy, coalesce([last.span, part.span]))
        else:
            joined.append(part)
    return tuple(joined)


def _replaced(
    checkpoint: Checkpoint,
    adapter: Adapter,
    tensor: ModelTensor,
    saved_name: str,
    numbers: tuple[int, ...] | None,
    target: ExpertFormat,
) -> Iterator[OutputTensor]:
    """A tensor with the adapter's values, of experts `numbers` of the adapter where it counts them."""
    ref = next(r for r in adapter.saved.values() if r.name == saved_name)
    source = adapter.format_of(ref)
    if tensor.role is Role.EXPERT_WEIGHT and tensor.format is not None:
        assert numbers is not None
        _, rows, columns = tensor.shape
        new = replace(tensor, stored=ref, scales=None, format=source)
        for i, stored_tensor in enumerate(target.tensors(rows, columns)):
            parts = _joined([_unchanged(new, number, target, i) for number in numbers])
            shape = (len(numbers), *stored_tensor.shape)
            yield OutputTensor(tensor.name + stored_tensor.suffix, stored_tensor.dtype, shape, parts)
        return
    stored = _format(checkpoint, tensor)
    spans = (
        [whole_span(ref)]
        if numbers is None
        else list(coalesce(expert_span(ref, number) for number in numbers))
    )
    converted_parts: list[Part] = [
        Copy(span) if source == stored else Cast(span, source, stored, ref.name) for span in spans
    ]
    yield OutputTensor(tensor.name, tensor.stored.dtype, tensor.shape, tuple(converted_parts))
