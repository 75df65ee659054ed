"""The importance matrix of a pruned model: the rows of its experts. llama-quantize wants a matrix of the same size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.gguf.block_types import BY_NAME
from moe_surgery.checkpoint.gguf.writer import Metadata, TensorEntry, header, padding
from moe_surgery.checkpoint.writer import OutputFile
from moe_surgery.errors import PlanMismatchError
from moe_surgery.selection.imatrix.matrix import DOWN, EXPERT_INPUTS, Entry, Imatrix
from moe_surgery.selection.imatrix.reader import COUNTS, SUMS
from moe_surgery.selection.plan import Plan

if TYPE_CHECKING:
    from moe_surgery.families.model_spec import ModelSpec

__all__ = ["cut_entries", "cut_imatrix"]

CHUNK_SIZE = 512
"""Of a matrix that does not say; llama.cpp's reader wants a number."""


def cut_imatrix(
    matrix: Imatrix, plan: Plan, model: ModelSpec, path: Path, *, ops: FileOps | None = None
) -> None:
    """Write the matrix of `model` pruned by `plan` to `path`, in the form of GGUF; whole or not at all.

    `matrix` must have counts (`matrix_of`). Entries of dense weights stay as they are, those of dropped layers for
    multi-token prediction are left out; tensors are in the order of their names, as llama.cpp writes them. Raises
    PlanMismatchError where a layer of the matrix is not in the plan, OutputError.
    """
    entries = cut_entries(matrix, plan, model)
    metadata = Metadata()
    metadata.text("general.type", "imatrix")
    metadata.texts("imatrix.datasets", [text.encode() for text in matrix.datasets])
    metadata.u32("imatrix.chunk_count", matrix.chunks)
    metadata.u32("imatrix.chunk_size", matrix.chunk_size or CHUNK_SIZE)
    f32 = BY_NAME["F32"]
    tensors, arrays = [], []
    for name in sorted(entries):
        entry = entries[name]
        assert entry.counts is not None
        dense = entry.experts == 1
        inputs = entry.sums.shape[1]
        for suffix, values, shape in (
            (SUMS, entry.sums, (inputs,) if dense else (entry.experts, inputs)),
            (COUNTS, entry.counts, (1,) if dense else (entry.experts, 1)),
        ):
            array = np.ascontiguousarray(values, np.float32)
            tensors.append(TensorEntry(name + suffix, f32, shape, array.nbytes))
            arrays.append(array)
    file = OutputFile(path, ops or FileOps(), direct=False)
    try:
        raw = header(metadata, tensors)
        file.write(memoryview(raw), 0)
        offset = len(raw)
        for array in arrays:
            data = array.tobytes() + bytes(padding(array.nbytes))
            file.write(memoryview(data), offset)
            offset += len(data)
    except BaseException:
        file.discard()
        raise
    file.publish()


def cut_entries(matrix: Imatrix, plan: Plan, model: ModelSpec) -> Mapping[str, Entry]:
    """The entries of the pruned model by the names of their weights. Raises PlanMismatchError."""
    kept = dict(zip(plan.numbers, plan.layers, strict=True))
    mtp = [int(name.rpartition(".")[2]) for name in model.mtp_layers]
    if plan.mtp_layers:
        kept |= dict(zip(mtp, plan.mtp_layers, strict=True))
    dropped = tuple(f"blk.{number}." for number in mtp if number not in kept)
    entries: dict[str, Entry] = {
        name: entry for name, entry in matrix.entries.items() if not name.startswith(dropped)
    }
    for block in matrix.blocks():
        for name in (*EXPERT_INPUTS, DOWN):
            full = f"blk.{block.number}.{name}"
            entry = entries.get(full)
            if entry is None:
                continue
            rows = kept.get(block.number)
            if rows is None or entry.experts != plan.num_source_experts:
                raise PlanMismatchError(
                    f"{matrix.where}: {full} has {entry.experts} experts, but the plan is for layers of "
                    f"{plan.num_source_experts}"
                    + ("" if rows is not None else f" and says nothing about block {block.number}")
                )
            assert entry.counts is not None
            chosen = list(rows)
            entries[full] = Entry(entry.sums[chosen], entry.counts[chosen])
    return entries
