"""Tensors over mapped shards: bytes are read when they are used, and never copied."""

from __future__ import annotations

import mmap
import sys
import threading
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress

import torch
from torch import Tensor

from moe_surgery.checkpoint.checkpoint import Checkpoint, TensorRef

__all__ = ["MappedShards"]

DTYPES: Mapping[str, torch.dtype] = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.uint8,  # exponents, biased by 127
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
READ_AHEAD_BYTES = 512 << 20
"""Read ahead at most: a layer of gpt-oss-20b. Where memory is short, more would push out what is in use."""
MADV_COLD = 20
"""Linux: reclaim these pages before others. Python's `mmap` does not name it."""
AT_ONCE = 1 << 20
REQUESTED_AHEAD = 8
"""Pieces of `AT_ONCE` bytes that the system has been asked for beyond the one that is waited for."""


class MappedShards:
    """Read-only mappings of a checkpoint's shards; they live as long as any tensor over them.

    Sources without a mapping are read instead, while the checkpoint is open.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._sources = {name: shard.source for name, shard in checkpoint.shards.items()}
        self._maps = {name: source.map() for name, source in self._sources.items()}

    def tensor(self, ref: TensorRef) -> Tensor:
        """The tensor at `ref` as a view of the mapping (a copy where its bytes are unaligned or the source has none).

        It must not be written to: the pages are read-only.
        """
        dtype = DTYPES[ref.dtype]
        mapped = self._maps[ref.shard]
        if mapped is None:
            raw = bytearray(ref.nbytes)
            self._sources[ref.shard].read_into(ref.offset, memoryview(raw))
            return torch.frombuffer(raw, dtype=dtype).view(ref.shape)
        if ref.offset % dtype.itemsize:
            raw = bytearray(mapped[ref.offset : ref.offset + ref.nbytes])
            return torch.frombuffer(raw, dtype=dtype).view(ref.shape)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(
                mapped, dtype=dtype, offset=ref.offset, count=ref.nbytes // dtype.itemsize
            )
        return flat.view(ref.shape)

    def prefetch(self, refs: Iterable[TensorRef]) -> None:
        """Have the system read the pages of `refs` in the background, up to `READ_AHEAD_BYTES`."""
        left = READ_AHEAD_BYTES
        for ref in refs:
            mapped, nbytes = self._maps[ref.shard], min(left, ref.nbytes)
            left -= nbytes
            if mapped is not None and nbytes and hasattr(mmap, "MADV_WILLNEED"):
                start = ref.offset - ref.offset % mmap.PAGESIZE
                mapped.madvise(mmap.MADV_WILLNEED, start, ref.offset + nbytes - start)

    def read_ahead(self, refs: Iterable[TensorRef], after: threading.Thread | None) -> threading.Thread:
        """Bring in the pages of `refs`, once `after` has ended: a thread that waits for the disk instead of their
        first use. It ends with the main thread."""

        def read() -> None:
            if after is not None:
                after.join()
            left = READ_AHEAD_BYTES
            for ref in refs:
                self._bring_in(ref, min(left, ref.nbytes))
                left -= min(left, ref.nbytes)

        thread = threading.Thread(target=read, name="moe-surgery-read-ahead")
        thread.start()
        return thread

    def _bring_in(self, ref: TensorRef, nbytes: int) -> None:
        mapped = self._maps[ref.shard]
        if mapped is None or not nbytes:
            return
        first, end = ref.offset - ref.offset % mmap.PAGESIZE, ref.offset + nbytes
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            pages = torch.frombuffer(mapped, dtype=torch.uint8, offset=first, count=end - first)
        asked = first
        for start in range(first, end, AT_ONCE):
            while asked < min(end, start + (1 + REQUESTED_AHEAD) * AT_ONCE):
                if hasattr(mmap, "MADV_WILLNEED"):
                    mapped.madvise(mmap.MADV_WILLNEED, asked, min(AT_ONCE, end - asked))
                asked += AT_ONCE
            if not threading.main_thread().is_alive():
                return
            # A byte of each page; other threads run meanwhile.
            pages[start - first : start - first + AT_ONCE : mmap.PAGESIZE].amax()

    def release(self, ref: TensorRef) -> None:
        """Release the pages of `ref`, which is not used soon; where memory is short they go first."""
        mapped = self._maps[ref.shard]
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            start = ref.offset - ref.offset % mmap.PAGESIZE
            extent = start, ref.offset + ref.nbytes - start
            if sys.platform == "linux":
                with suppress(OSError):  # before Linux 5.4
                    mapped.madvise(MADV_COLD, *extent)
            mapped.madvise(mmap.MADV_DONTNEED, *extent)
