"""The output tensors of a catalogue family: experts dropped and renumbered, everything else copied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from moe_surgery.checkpoint.checkpoint import TensorRef
from moe_surgery.checkpoint.dtypes import DTYPE_BITS
from moe_surgery.engine.spans import Copy, Span, coalesce
from moe_surgery.families.base import Role
from moe_surgery.families.model_spec import EXPERT, ModelSpec, ModelTensor
from moe_surgery.selection.plan import Plan
from moe_surgery.surgery.program import OutputTensor, Remap

__all__ = ["expert_groups", "whole_groups"]

Group = tuple[OutputTensor, ...]


def whole_groups(model: ModelSpec, plan: Plan) -> Iterator[Group]:
    """The tensors that are copied whole, without those of dropped MTP layers."""
    for tensor in model.tensors:
        if tensor.layer is None and not (tensor.mtp and plan.mtp_layers == ()):
            ref = tensor.stored
            span = Span(ref.shard, ref.offset, ref.nbytes)
            yield (OutputTensor(tensor.name, ref.dtype, ref.shape, (Copy(span),)),)


def expert_groups(model: ModelSpec, plan: Plan) -> Iterator[Group]:
    """The tensors that count experts, layer by layer.

    An expert's tensors are one group, weights and scales, and so are a stacked weight and its scales.
    """
    for layer in _layers(model):
        kept = _kept(plan, layer[0])
        if kept is None:
            continue
        numbered = [t for t in layer if t.pieces]
        group: list[OutputTensor] = []
        for tensor in layer:
            if tensor.pieces:
                continue
            output = _cut(tensor, kept, model.experts)
            if group and not output.name.startswith(_stem(group[0].name)):
                yield tuple(group)
                group = []
            group.append(output)
        if group:
            yield tuple(group)
        yield from _experts(numbered, kept, model.experts)


def _layers(model: ModelSpec) -> Iterator[list[ModelTensor]]:
    """The tensors that count experts, those of one layer at a time."""
    layer: list[ModelTensor] = []
    for tensor in model.tensors:
        if tensor.layer is None:
            continue
        if layer and (tensor.layer, tensor.mtp) != (layer[0].layer, layer[0].mtp):
            yield layer
            layer = []
        layer.append(tensor)
    if layer:
        yield layer


def _kept(plan: Plan, tensor: ModelTensor) -> Sequence[int] | None:
    """The experts that the layer of `tensor` keeps; None where the layer is dropped."""
    assert tensor.layer is not None
    if not tensor.mtp:
        return plan.layers[tensor.layer]
    assert plan.mtp_layers is not None
    return plan.mtp_layers[tensor.layer] if plan.mtp_layers else None


def _stem(name: str) -> str:
    """What the name of a stacked weight and those of its scales begin with."""
    return name.removesuffix("_blocks")


def _experts(tensors: list[ModelTensor], kept: Sequence[int], experts: int) -> Iterator[Group]:
    """One group for each kept expert, wide dtypes first, so that all are aligned where sizes allow it."""
    if not tensors:
        return
    ordered = sorted(tensors, key=lambda t: (-DTYPE_BITS[t.stored.dtype], t.name))
    tail = max(t.tail for t in tensors)
    for number, expert in enumerate([*kept, *range(experts, experts + tail)]):
        yield tuple(
            _copied(tensor.name.replace(EXPERT, str(number)), tensor.pieces[expert])
            for tensor in ordered
            if expert < len(tensor.pieces)
        )


def _copied(name: str, ref: TensorRef) -> OutputTensor:
    return OutputTensor(name, ref.dtype, ref.shape, (Copy(Span(ref.shard, ref.offset, ref.nbytes)),))


def _cut(tensor: ModelTensor, kept: Sequence[int], experts: int) -> OutputTensor:
    """A tensor with only the kept experts, and its tail, along its axis."""
    ref = tensor.stored
    if tensor.role is Role.ROUTING_TABLE:
        span = Span(ref.shard, ref.offset, ref.nbytes)
        itemsize = DTYPE_BITS[ref.dtype] // 8
        part = Remap(span, ref.shape[1], itemsize, tuple(kept), experts, ref.name)
        return OutputTensor(tensor.name, ref.dtype, ref.shape, (part,))
    entries = [*kept, *range(experts, experts + tensor.tail)]
    outer, count = prod(ref.shape[: tensor.axis]), ref.shape[tensor.axis]
    step = ref.nbytes // (outer * count)
    spans = (
        Span(ref.shard, ref.offset + (block * count + entry) * step, step)
        for block in range(outer)
        for entry in entries
    )
    shape = (*ref.shape[: tensor.axis], len(entries), *ref.shape[tensor.axis + 1 :])
    return OutputTensor(tensor.name, ref.dtype, shape, tuple(map(Copy, coalesce(spans))))
