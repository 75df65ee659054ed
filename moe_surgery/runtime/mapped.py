"""Tensors over mapped shards: no bytes are read until they are used, none are copied."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from moe_surgery.checkpoint.checkpoint import Checkpoint, TensorRef

__all__ = ["MappedShards"]

DTYPES: Mapping[str, torch.dtype] = {
    "U8": torch.uint8,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}


class MappedShards:
    """Read-only mappings of a checkpoint's shards; they live as long as any tensor over them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._maps = {
            name: mmap.mmap(shard.fd, 0, prot=mmap.PROT_READ) for name, shard in checkpoint.shards.items()
        }

    def tensor(self, ref: TensorRef) -> Tensor:
        """The tensor at `ref` as a view of the mapping (a copy only if its bytes lie unaligned).

        It must not be written to: the pages are read-only.
        """
        dtype = DTYPES[ref.dtype]
        if ref.offset % dtype.itemsize:
            raw = bytearray(self._maps[ref.shard][ref.offset : ref.offset + ref.nbytes])
            return torch.frombuffer(raw, dtype=dtype).view(ref.shape)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(
                self._maps[ref.shard], dtype=dtype, offset=ref.offset, count=ref.nbytes // dtype.itemsize
            )
        return flat.view(ref.shape)

    def release(self, ref: TensorRef) -> None:
        """Let go of the pages of `ref` after it was copied to a device."""
        if hasattr(mmap, "MADV_DONTNEED"):
            start = ref.offset - ref.offset % mmap.PAGESIZE
            self._maps[ref.shard].madvise(mmap.MADV_DONTNEED, start, ref.offset + ref.nbytes - start)
