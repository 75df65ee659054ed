"""Where experts lie in their files, and the memory that one of them takes."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_surgery.checkpoint.checkpoint import TensorRef
from moe_surgery.checkpoint.direct_file import BLOCK, DirectFile
from moe_surgery.kernels.weights import DenseWeight, ExpertWeights, Mxfp4Weight, Weight
from moe_surgery.runtime.mapped import DTYPES
from moe_surgery.runtime.residency.reads import Read, room

__all__ = ["ExpertFiles", "Slot", "Weights", "aligned_memory", "one_expert", "placed"]


Weights = tuple[Weight, Weight]
"""Of one expert: gate_up and down, each with an axis 0 of length 1."""


def aligned_memory(nbytes: int) -> mmap.mmap:
    """Memory of this process alone that starts at a page; it is freed with the last view."""
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def placed(file: DirectFile, ref: TensorRef, memory: mmap.mmap, at: int) -> tuple[Read, Tensor]:
    """The read of `ref`, aligned to its elements, to `at`, a block's start, of `memory`, and the tensor it fills."""
    dtype = DTYPES[ref.dtype]
    first = at + ref.offset % BLOCK
    flat = torch.frombuffer(memory, dtype=dtype, offset=first, count=ref.nbytes // dtype.itemsize)
    buffer = memoryview(memory)[at : at + room(ref.nbytes)]
    address = flat.data_ptr() - ref.offset % BLOCK
    return Read(file, ref.offset, ref.nbytes, buffer, address), flat.view(ref.shape)


@dataclass(frozen=True, slots=True)
class ExpertFiles:
    """The stored experts of a model: `weights[layer]` are the tensors of gate_up and down, all experts together.

    A weight is (values,) or (blocks, scales); axis 0 counts experts. `files` are the shards by name.
    """

    files: Mapping[str, DirectFile]
    weights: Sequence[tuple[tuple[TensorRef, ...], tuple[TensorRef, ...]]]

    @property
    def experts(self) -> int:
        """Stored experts of a layer."""
        return self.weights[0][0][0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of one expert."""
        return max(
            sum(ref.nbytes // ref.shape[0] for part in layer for ref in part) for layer in self.weights
        )

    @property
    def slot_bytes(self) -> int:
        """Memory of one expert, wherever it lies in its file."""
        return max(
            sum(room(ref.nbytes // ref.shape[0]) for part in layer for ref in part) for layer in self.weights
        )


class Slot:
    """Memory of one expert, and what is in it."""

    def __init__(self, nbytes: int, pinned: bool = False) -> None:
        """`pinned`: for copies to a CUDA device."""
        self._memory = aligned_memory(nbytes)
        if pinned:
            _pin(self, self._memory)
        self.weights: Weights

    def reads(self, files: ExpertFiles, layer: int, expert: int) -> list[Read]:
        """What fills the slot with an expert, whose `weights` it then holds."""
        at, reads, weights = 0, [], []
        for part in files.weights[layer]:
            tensors = []
            for stored in part:
                ref = stored.rows(expert, 1)
                read, tensor = placed(files.files[ref.shard], ref, self._memory, at)
                reads.append(read)
                tensors.append(tensor)
                at += room(ref.nbytes)
            weights.append(Mxfp4Weight(*tensors) if len(tensors) == 2 else DenseWeight(*tensors))
        self.weights = weights[0], weights[1]
        return reads


def _pin(slot: Slot, memory: mmap.mmap) -> None:
    """Pin `memory` for as long as `slot` lives."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    if not int(runtime.cudaHostRegister(address, len(memory), 0)):
        weakref.finalize(slot, runtime.cudaHostUnregister, address)


def one_expert(weights: Weights, all_experts: ExpertWeights, expert: int) -> ExpertWeights:
    """An expert as the only one of its layer, with its row of the biases of `all_experts`."""
    gate_up, down = weights
    biases = all_experts.gate_up_bias[expert : expert + 1], all_experts.down_bias[expert : expert + 1]
    return ExpertWeights(gate_up, biases[0], down, biases[1], None, all_experts.limit, all_experts.alpha)
