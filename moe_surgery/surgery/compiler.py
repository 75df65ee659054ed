"""Plan x checkpoint -> `Program`: the shard and the source bytes of each output tensor."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence

from moe_surgery.checkpoint.checkpoint import CONFIG_NAME, INDEX_NAME, Checkpoint, TensorRef
from moe_surgery.checkpoint.dtypes import DTYPE_BITS
from moe_surgery.checkpoint.header import build_header
from moe_surgery.checkpoint.index import build_index
from moe_surgery.engine.spans import Copy, Span, coalesce
from moe_surgery.errors import PlanMismatchError, UsageError
from moe_surgery.families.base import CatalogFamily, Role
from moe_surgery.families.model_spec import ModelSpec, ModelTensor
from moe_surgery.formats.expert_format import EXPERT_DTYPES, ExpertFormat, format_by_name
from moe_surgery.selection.plan import Plan
from moe_surgery.surgery.config import output_config
from moe_surgery.surgery.mtp import choose_mtp
from moe_surgery.surgery.names import MANIFEST_NAME, MAPPING_NAME, README_NAME, SOURCE_README_NAME
from moe_surgery.surgery.program import (
    Cast,
    Decode,
    Encode,
    OutputShard,
    OutputTensor,
    Program,
    SourceFile,
)
from moe_surgery.surgery.routing import check_routing

__all__ = ["compile_program", "converted", "expert_span", "whole_span"]

DEFAULT_SHARD_SIZE = 5 * 10**9
# Reflink needs source and target offsets equal modulo the block size of the file system: nearly
# always 4096, and a header padded to that residue costs at most one block.
BLOCK = 4096

Group = tuple[OutputTensor, ...]


def compile_program(
    checkpoint: Checkpoint,
    model: ModelSpec,
    plan: Plan,
    *,
    store: str = "keep",
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    mtp: str | None = None,
    separate_dense: bool = False,
) -> Program:
    """The program that writes `plan` applied to `checkpoint`.

    `store`: "keep" copies expert weights unchanged; "bf16", "mxfp4", "f16" and "f32" convert
    them from other formats. `max_shard_size` bounds the tensor bytes of a shard; a larger tensor gets a
    separate shard. `mtp`: "keep" (default) cuts layers for multi-token prediction to the same number of experts
    (`mtp.choose_mtp` says which), "drop" leaves those layers out.
    `separate_dense`: tensors that do not count experts get shards of their own, however small the model is.

    Raises UsageError for an unknown format or size, PlanMismatchError for a plan of another model or
    one whose layers keep different numbers of experts.
    """
    if store not in (*EXPERT_DTYPES, model.expert_format.name):
        raise UsageError(f"`store` {store}: choose one of {', '.join(EXPERT_DTYPES)}")
    if max_shard_size < 1:
        raise UsageError(f"`max_shard_size` {max_shard_size}: must be at least one byte")
    by_name = isinstance(model.family, CatalogFamily)
    if by_name and store not in ("keep", model.expert_format.name):
        raise UsageError(
            f"`store` {store}: experts of {model.family.title} are copied as they are stored; conversions support "
            "gpt-oss only"
        )
    plan.check_fits(model.model_type, model.experts, model.layers, str(checkpoint.path), model.layer_numbers)
    kept = plan.uniform_experts
    if kept is None:
        counts = sorted({len(row) for row in plan.layers})
        # nvidia/gpt-oss-puzzle-88B has a count per layer, but is a different model type with custom code.
        raise PlanMismatchError(
            f"the plan keeps between {counts[0]} and {counts[-1]} experts per layer, but config.json of a "
            f"{model.model_type} model has one number for all layers; keep the same number in every layer, or use "
            "the plan with generate or evaluate, which write no checkpoint"
        )
    target = model.expert_format if store == "keep" or by_name else format_by_name(store)
    top_k = min(plan.top_k or model.top_k, kept)
    plan = choose_mtp(checkpoint, model, plan, top_k, mtp)
    check_routing(model, plan, top_k)
    quantization: dict[str, bytes] = {}
    if by_name:
        from moe_surgery.surgery.by_name import expert_groups, whole_groups
        from moe_surgery.surgery.expert_names import quantization_files

        quantization = quantization_files(checkpoint, model, plan)
        dense, experts = list(whole_groups(model, plan)), list(expert_groups(model, plan))
    else:
        dense = [(t,) for t in _outputs(model, plan, target, dense=True)]
        experts = list(_paired(_outputs(model, plan, target, dense=False)))
    shards = _shards(dense, experts, max_shard_size, separate_dense)
    texts = {
        CONFIG_NAME: _json(output_config(model, plan, kept, top_k, target)),
        MAPPING_NAME: _json(expert_mapping(plan, model.mtp_layers)),
        **quantization,
    }
    if len(shards) > 1:
        weight_map = {t.name: s.name for s in shards for t in s.tensors}
        texts[INDEX_NAME] = build_index(weight_map, sum(t.nbytes for s in shards for t in s.tensors))
    sources = tuple(SourceFile(n, s.nbytes, s.header.digest) for n, s in sorted(checkpoint.shards.items()))
    return Program(
        plan,
        target,
        model.layout.name,
        sources,
        shards,
        texts,
        _side_files(checkpoint, model, set(texts)),
        (model.without_mtp() if plan.mtp_layers == () else model).parameters(kept),
        top_k,
    )


def expert_mapping(plan: Plan, mtp_layers: Sequence[str] = ()) -> dict[str, dict[str, int]]:
    """Source expert -> output expert per layer, in the format of the published pruned models.

    Layers have the model's numbers; those for multi-token prediction their names.
    """
    rows = {str(number): kept for number, kept in zip(plan.numbers, plan.layers, strict=True)}
    if plan.mtp_layers:
        rows |= dict(zip(mtp_layers, plan.mtp_layers, strict=True))
    return {layer: {str(old): new for new, old in enumerate(kept)} for layer, kept in rows.items()}


def _outputs(model: ModelSpec, plan: Plan, target: ExpertFormat, *, dense: bool) -> Iterator[OutputTensor]:
    for tensor in model.tensors:
        if tensor.has_experts is dense:
            continue
        if tensor.layer is None or not tensor.has_experts:
            yield OutputTensor(
                tensor.name, tensor.stored.dtype, tensor.shape, (Copy(whole_span(tensor.stored)),)
            )
        elif tensor.role is Role.EXPERT_WEIGHT:
            yield from _expert_weight(tensor, plan.layers[tensor.layer], target)
        else:
            yield _gathered(tensor.name, tensor.stored, plan.layers[tensor.layer])


def _expert_weight(tensor: ModelTensor, kept: Sequence[int], target: ExpertFormat) -> Iterator[OutputTensor]:
    _, rows, columns = tensor.shape
    if not target.fits_columns(columns):
        raise UsageError(
            f"`store` {target.name}: tensor {tensor.name!r} has {columns} columns, "
            f"not a multiple of {target.block_values}"
        )
    stored = target.tensors(rows, columns)
    if tensor.format == target:
        refs = filter(None, (tensor.stored, tensor.scales))
        for ref, target_tensor in zip(refs, stored, strict=True):
            yield _gathered(tensor.name + target_tensor.suffix, ref, kept)
        return
    for target_tensor, parts in zip(stored, converted(tensor, kept, target), strict=True):
        yield OutputTensor(
            tensor.name + target_tensor.suffix, target_tensor.dtype, (len(kept), *target_tensor.shape), parts
        )


def converted(
    tensor: ModelTensor, kept: Sequence[int], target: ExpertFormat
) -> Iterator[tuple[Decode, ...] | tuple[Cast, ...] | tuple[Encode, ...]]:
    """The kept experts in `target`, for each of its tensors."""
    _, rows, columns = tensor.shape
    stored, scales, source = tensor.stored, tensor.scales, tensor.format
    assert source is not None
    values = [expert_span(stored, e) for e in kept]
    if scales is not None:
        pairs = zip(values, (expert_span(scales, e) for e in kept), strict=True)
        yield tuple(Decode(b, s, rows, columns, target, stored.name) for b, s in pairs)
    elif target.packed:
        for is_scales in (False, True):
            yield tuple(Encode(v, rows, columns, is_scales, stored.name, source) for v in values)
    else:
        yield tuple(Cast(v, source, target, stored.name) for v in coalesce(values))


def _gathered(name: str, ref: TensorRef, kept: Sequence[int]) -> OutputTensor:
    spans = coalesce(expert_span(ref, e) for e in kept)
    return OutputTensor(name, ref.dtype, (len(kept), *ref.shape[1:]), tuple(map(Copy, spans)))


def whole_span(ref: TensorRef) -> Span:
    return Span(ref.shard, ref.offset, ref.nbytes)


def expert_span(ref: TensorRef, expert: int) -> Span:
    return whole_span(ref.rows(expert, 1))


def _paired(tensors: Iterator[OutputTensor]) -> Iterator[Group]:
    """Groups of tensors that must be in the same shard: encoded blocks and their scales."""
    blocks: OutputTensor | None = None
    for tensor in tensors:
        first = tensor.parts[0]
        if isinstance(first, Encode) and not first.scales:
            blocks = tensor
        elif isinstance(first, Encode) and blocks is not None:
            yield blocks, tensor
        else:
            yield (tensor,)


def _shards(dense: list[Group], experts: list[Group], limit: int, separate: bool) -> tuple[OutputShard, ...]:
    """One shard if everything fits and need not be separate, else shards of dense tensors and then of experts'.

    The tensors of a group stay adjacent where alignment allows it.
    """
    everything = [*dense, *experts]
    whole = _packed(everything, limit)
    first = [] if len(whole) == 1 and not separate else _packed(dense, limit)
    packed = [*first, *_packed(experts, limit)] if first else whole
    names = (
        ["model.safetensors"]
        if len(packed) == 1
        else [f"model-{i:05d}-of-{len(packed):05d}.safetensors" for i in range(1, len(packed) + 1)]
    )
    return tuple(
        _shard(name, groups, dense=number < len(first))
        for number, (name, groups) in enumerate(zip(names, packed, strict=True))
    )


def _packed(groups: list[Group], limit: int) -> list[list[Group]]:
    """Groups in order, packed greedily into runs of at most `limit` bytes."""
    runs: list[list[Group]] = []
    filled = limit + 1
    for group in groups:
        size = sum(t.nbytes for t in group)
        if filled + size > limit:
            runs.append([])
            filled = 0
        runs[-1].append(group)
        filled += size
    return runs


def _shard(name: str, groups: list[Group], *, dense: bool) -> OutputShard:
    ordered = _ordered(groups)
    entries = [(t.name, t.dtype, t.shape) for t in ordered]
    header = build_header(entries, metadata={"format": "pt"}, pad_to=BLOCK, residue=_reflink_residue(ordered))
    return OutputShard(name, header, tuple(ordered), dense)


def _ordered(groups: list[Group]) -> list[OutputTensor]:
    """The tensors with groups adjacent, or else widest dtype first, so that every tensor is aligned.

    Single tensors are ordered by dtype as safetensors' own writer does, before the groups, or after them where
    they would leave those unaligned.
    """
    single = sorted((g for g in groups if len(g) == 1), key=lambda g: -DTYPE_BITS[g[0].dtype])
    several = [g for g in groups if len(g) > 1]
    for order in ((single, several), (several, single)):
        tensors = [t for part in order for group in part for t in group]
        if _aligned(tensors):
            return tensors
    return sorted(tensors, key=lambda t: -DTYPE_BITS[t.dtype])


def _aligned(tensors: list[OutputTensor]) -> bool:
    """Whether each tensor begins at a multiple of its element's size."""
    position = 0
    for tensor in tensors:
        if position * 8 % DTYPE_BITS[tensor.dtype]:
            return False
        position += tensor.nbytes
    return True


def _reflink_residue(tensors: list[OutputTensor]) -> int:
    """The header length modulo `BLOCK` with which the most copied bytes can be reflinked."""
    gains: Counter[int] = Counter()
    position = 0
    for part in (p for t in tensors for p in t.parts):
        residue = (part.span.offset - position) % BLOCK if isinstance(part, Copy) else 0
        if isinstance(part, Copy) and residue % 8 == 0:
            gains[residue] += max(0, part.nbytes - BLOCK)
        position += part.nbytes
    best = max(gains, key=lambda r: (gains[r], -r), default=0)
    return best if gains[best] else 0


def _side_files(checkpoint: Checkpoint, model: ModelSpec, written: set[str]) -> dict[str, str]:
    """Output name -> name in the source's folder of every file copied along with the weights."""
    own = {MANIFEST_NAME, MAPPING_NAME, SOURCE_README_NAME} | written | model.layout.side_files_dropped
    copies = {n: n for n in checkpoint.side_files if n not in own}
    parent = checkpoint.files.folder(os.pardir) if model.layout.parent_side_files else None
    if parent is not None and parent.is_file(CONFIG_NAME):
        for name in model.layout.parent_side_files:
            if name not in copies and parent.is_file(name):
                copies[name] = os.path.join(os.pardir, name)
    if README_NAME in copies:
        copies[SOURCE_README_NAME] = copies.pop(README_NAME)
    return dict(sorted(copies.items()))


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
