"""Compares a pruned GGUF file with its source, byte for byte."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.gguf.header import KeyValue
from moe_surgery.checkpoint.gguf.model_file import GgufModel, GgufShard, GgufTensor
from moe_surgery.checkpoint.gguf.resolve import open_gguf
from moe_surgery.checkpoint.gguf.writer import padding
from moe_surgery.checkpoint.text import printable
from moe_surgery.engine.chunks import Chunk
from moe_surgery.engine.producer import produce
from moe_surgery.engine.spans import Literal
from moe_surgery.errors import PlanMismatchError
from moe_surgery.families.gguf import identify_gguf
from moe_surgery.families.model_spec import ModelSpec
from moe_surgery.selection.plan import Plan, numbers_of
from moe_surgery.surgery.findings import Findings
from moe_surgery.surgery.gguf.compiler import compile_gguf_prune
from moe_surgery.surgery.gguf.metadata import OWN, SPLIT_KEYS
from moe_surgery.surgery.gguf.own_keys import own_keys
from moe_surgery.surgery.gguf.producer import gguf_producer
from moe_surgery.surgery.gguf.program import (
    GgufOutputFile,
    GgufOutputTensor,
    GgufPart,
    GgufPruneProgram,
    Head,
    Pad,
)

__all__ = ["compare_with_source"]

_WINDOW: Final = 1 << 20


def compare_with_source(
    model: GgufModel, spec: ModelSpec, source: str | os.PathLike[str], findings: Findings
) -> None:
    """Add to `findings` every tensor and key of `model` that is not that of `source`, cut by the same plan.

    Raises PlanMismatchError where `source` is another model, and any error of opening it.
    """
    with open_gguf(source) as original:
        full = identify_gguf(original)
        program = _program(model, spec, original, full)
        _compare_keys(model, original, program, findings)
        expected = {tensor.name: tensor for file in program.files for tensor in file.weights}
        for name in sorted({*expected, *model.tensors}):
            planned, actual = expected.get(name), model.tensors.get(name)
            if (
                planned is None
                or actual is None
                or (planned.type, planned.shape) != (actual.type, actual.shape)
            ):
                findings.problems.append(
                    f"{model.where(name)}: is {_kind(actual)}, expected {_kind(planned)} of "
                    f"{printable_path(original.path)}"
                )
        if findings.problems:
            return
        for shard in model.shards.values():
            findings.attempt(lambda s=shard: _compare_file(s, expected, original, model.alignment, findings))  # type: ignore[misc]
        original.check_unchanged()


def _program(model: GgufModel, spec: ModelSpec, original: GgufModel, full: ModelSpec) -> GgufPruneProgram:
    """What pruning `original` as `model` says it was pruned would write."""
    kept = own_keys(model)
    rows = kept.rows if kept else {}
    everything = tuple(range(full.experts))
    experts = kept.experts if kept else spec.experts
    shape = spec.family.title, experts, spec.layer_numbers
    if shape != (full.family.title, full.experts, full.layer_numbers):
        raise PlanMismatchError(
            f"{printable_path(original.path)}: not the source of {printable_path(model.path)}: it is "
            f"{full.family.title} with {full.layers} layers of {full.experts} experts, the source is "
            f"{spec.family.title} with {spec.layers} layers of {experts}"
        )
    mtp_names = tuple(int(name.removeprefix("blk.")) for name in full.mtp_layers)
    dropped = bool(full.dimensions["mtp_blocks"]) and not spec.dimensions["mtp_blocks"]
    mtp = () if dropped else tuple(rows.get(n, everything) for n in mtp_names) or None
    plan = Plan(
        full.model_type,
        full.experts,
        tuple(rows.get(n, everything) for n in full.layer_numbers),
        kept.top_k if kept else None,
        layer_numbers=numbers_of(full),
        mtp_layers=mtp,
    )
    return compile_gguf_prune(original, full, plan, mtp="drop" if dropped else None)


def _compare_keys(
    model: GgufModel, original: GgufModel, program: GgufPruneProgram, findings: Findings
) -> None:
    """Every key but those of splits and our own must be the planned bytes."""
    actual = {k: e for k, e in model.metadata.items() if k not in SPLIT_KEYS and not k.startswith(OWN)}
    planned = {k: parts for k, parts in program.keys.items() if not k.startswith(OWN)}
    where = printable_path(model.path)
    for key in sorted({*actual, *planned}):
        if key not in actual or key not in planned:
            what = "missing" if key not in actual else "not in the source"
            findings.problems.append(f"{where}: key '{printable(key)}' is {what}")
        elif not _same_bytes(model, actual[key], original, planned[key]):
            findings.problems.append(f"{where}: key '{printable(key)}' differs from the source's")


def _same_bytes(model: GgufModel, entry: KeyValue, original: GgufModel, parts: Sequence[GgufPart]) -> bool:
    """Whether an entry is made of `parts`, compared in windows."""
    if entry.nbytes != sum(part.nbytes for part in parts):
        return False
    position = entry.offset
    source = model.shards[model.name].source
    for part in parts:
        for start in range(0, part.nbytes, _WINDOW):
            count = min(_WINDOW, part.nbytes - start)
            if isinstance(part, Literal):
                expected = part.content[start : start + count]
            else:
                (span,) = part.spans_read
                expected = original.shards[span.shard].source.read(span.offset + start, count)
            if source.read(position, count) != expected:
                return False
            position += count
    return True


def _compare_file(
    shard: GgufShard,
    tensors: Mapping[str, GgufOutputTensor],
    original: GgufModel,
    alignment: int,
    findings: Findings,
) -> None:
    """Produce the weights of a file again from the source and compare them with the bytes on disk."""
    names = list(shard.header.tensors)
    start = shard.header.data_start
    weights = tuple(_padded(tensors[name], alignment) for name in names)
    expected = GgufOutputFile(shard.name, b"", Head((Pad(start),)), weights)
    different: dict[str, None] = {}

    def consume(chunk: Chunk, buffer: memoryview) -> None:
        count = min(chunk.nbytes, shard.nbytes - chunk.offset)  # the last padding may be left out
        actual = memoryview(bytearray(chunk.nbytes))
        shard.source.read_into(chunk.offset, actual[:count])
        if actual != buffer:
            for piece in chunk.slices:
                if piece.tensor > 0 and piece.of(actual) != piece.of(buffer):
                    different[names[piece.tensor - 1]] = None
        findings.advance(len(buffer))

    produce(expected, gguf_producer(expected, original.shards), consume)
    for name in different:
        findings.problems.append(
            f"{shard.where}: tensor '{printable(name)}': differs from the kept experts of "
            f"{printable_path(original.path)}"
        )


def _padded(tensor: GgufOutputTensor, alignment: int) -> GgufOutputTensor:
    return replace(tensor, padding=padding(tensor.nbytes, alignment))


def _kind(tensor: GgufTensor | GgufOutputTensor | None) -> str:
    return "absent" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
