"""Hidden states of many passages between two layers: in memory, or in a file when there are many."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import accumulate

import torch
from torch import Tensor

__all__ = ["HiddenStates", "rows_buffer"]

# Larger buffers are mapped from a file, which the system can write back when memory is short.
IN_MEMORY_BYTES = 512 << 20
# Tokens per operation: bounds its temporary memory.
CHUNK_TOKENS = 2048


def rows_buffer(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros [rows, columns] on `device`; in host memory mapped from an unnamed file if they are many."""
    nbytes = rows * columns * dtype.itemsize
    if nbytes <= IN_MEMORY_BYTES:
        return torch.zeros((rows, columns), dtype=dtype, device=device)
    fd, name = tempfile.mkstemp(prefix="moe-surgery-states-")
    try:
        os.truncate(fd, nbytes)
        mapped = torch.from_file(name, shared=True, size=rows * columns, dtype=dtype)
    finally:
        os.close(fd)
        with suppress(OSError):
            os.unlink(name)
    return mapped.view(rows, columns)


class HiddenStates:
    """Hidden states [tokens, hidden] of passages one after another.

    `lengths` are the passages' tokens. Rows are read to and written from `device`, wherever they are stored.
    """

    def __init__(self, lengths: Sequence[int], hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        self.lengths = list(lengths)
        self.starts = [0, *accumulate(self.lengths)]
        self.tokens = self.starts[-1]
        self.dtype, self.device = dtype, device
        self.rows = rows_buffer(self.tokens, hidden, dtype, device)

    def __getitem__(self, where: slice | Tensor) -> Tensor:
        """Rows `where`, on the compute device."""
        where = where.to(self.rows.device) if isinstance(where, Tensor) else where
        return self.rows[where].to(self.device)

    def __setitem__(self, where: slice, values: Tensor) -> None:
        self.rows[where] = values.to(self.rows.device)

    def add(self, where: slice, values: Tensor) -> None:
        """Add `values`, of any float dtype, to rows `where`."""
        self.rows[where].add_(values.to(self.rows.device).to(self.dtype))

    def pieces(self) -> Iterator[slice]:
        """All tokens in runs of at most `CHUNK_TOKENS`."""
        for start in range(0, self.tokens, CHUNK_TOKENS):
            yield slice(start, min(start + CHUNK_TOKENS, self.tokens))

    def groups(self) -> Iterator[tuple[int, int]]:
        """Runs [first, last) of whole passages of together at most `CHUNK_TOKENS` tokens, or one passage."""
        first = 0
        for last in range(1, len(self.lengths) + 1):
            full = last == len(self.lengths) or self.starts[last + 1] - self.starts[first] > CHUNK_TOKENS
            if full:
                yield first, last
                first = last
