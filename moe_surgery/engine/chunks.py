"""An output file as fixed-size chunks, each a list of slices of parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Final, NamedTuple, Protocol

from moe_surgery.engine.spans import Span

__all__ = [
    "CHUNK_BYTES",
    "Chunk",
    "FileLayout",
    "FilePart",
    "PartSlice",
    "TensorLayout",
    "chunks_of",
    "chunks_of_sizes",
    "parts_of",
    "plain_chunks",
]

# Large enough that the cost of a request is small, small enough that several in flight fit a 64 MiB
# process; a multiple of any block size, as direct writes require.
CHUNK_BYTES: Final = 2 << 20


class FilePart(Protocol):
    """A part of an output file."""

    @property
    def nbytes(self) -> int: ...

    @property
    def spans_read(self) -> tuple[Span, ...]:
        """The source bytes that it is made of; none where they are read for another part."""
        ...


class TensorLayout(Protocol):
    """One tensor of an output file; its parts are contiguous."""

    @property
    def parts(self) -> Sequence[FilePart]: ...


class FileLayout(Protocol):
    """An output file: `header`, then `tensors` in order."""

    @property
    def header(self) -> bytes: ...

    @property
    def tensors(self) -> Sequence[TensorLayout]: ...

    @property
    def nbytes(self) -> int: ...


class PartSlice(NamedTuple):
    """Bytes [start, start + nbytes) of `part`, placed at `position` in the chunk.

    `part` is None for the file's header, and for all of an existing file. `tensor` is the index of the
    tensor in the file, -1 for the header.
    """

    tensor: int
    part: FilePart | None
    start: int
    position: int
    nbytes: int

    def of(self, buffer: memoryview) -> memoryview:
        """The bytes of this slice in the chunk's `buffer`."""
        return buffer[self.position : self.position + self.nbytes]


class Chunk(NamedTuple):
    """`nbytes` bytes of the output file at `offset`, made of `slices` in order."""

    offset: int
    nbytes: int
    slices: tuple[PartSlice, ...]


def parts_of(layout: FileLayout) -> Iterator[tuple[int, FilePart | None, int]]:
    """(tensor, part, bytes) in the order of the file; the header is part None of tensor -1."""
    yield -1, None, len(layout.header)
    for i, tensor in enumerate(layout.tensors):
        for part in tensor.parts:
            yield i, part, part.nbytes


def chunks_of(layout: FileLayout, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """The file as consecutive chunks of `chunk_bytes` (the last one shorter)."""
    return _chunks(parts_of(layout), chunk_bytes)


def chunks_of_sizes(header: int, tensors: Iterable[int]) -> Iterator[Chunk]:
    """An existing file as chunks, given the bytes of its header and of each tensor; slices have no part."""
    sizes = chain([(-1, header)], enumerate(tensors))
    return _chunks(((tensor, None, nbytes) for tensor, nbytes in sizes), CHUNK_BYTES)


def _chunks(parts: Iterable[tuple[int, FilePart | None, int]], chunk_bytes: int) -> Iterator[Chunk]:
    offset, filled = 0, 0
    slices: list[PartSlice] = []
    for tensor, part, total in parts:
        start = 0
        while start < total:
            count = min(total - start, chunk_bytes - filled)
            slices.append(PartSlice(tensor, part, start, filled, count))
            start += count
            filled += count
            if filled == chunk_bytes:
                yield Chunk(offset, filled, tuple(slices))
                offset, filled, slices = offset + filled, 0, []
    if filled:
        yield Chunk(offset, filled, tuple(slices))


def plain_chunks(nbytes: int) -> Iterator[Chunk]:
    """Chunks of a file of `nbytes` bytes without known parts."""
    for offset in range(0, nbytes, CHUNK_BYTES):
        yield Chunk(offset, min(CHUNK_BYTES, nbytes - offset), ())
