"""Fixed windows over an output file, and what each window is made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from moe_surgery.surgery.program import OutputShard

__all__ = ["CHUNK_BYTES", "AnyPart", "Chunk", "Piece", "chunks_of", "chunks_over"]

# Large enough that a request costs little beside its bytes, small enough that a handful in flight
# fits a 64 MiB process; a multiple of any block size, as direct writes require.
CHUNK_BYTES: Final = 2 << 20


class AnyPart(Protocol):
    """What chunks have to know of a part of an output file."""

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [start, start + nbytes) of `part`, placed at `position` in the chunk.

    `part` None stands for the file's header. `tensor` is the index of the tensor in the shard, -1
    for the header.
    """

    tensor: int
    part: AnyPart | None
    start: int
    position: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """`nbytes` bytes of the output file at `offset`, made of `pieces` in order."""

    offset: int
    nbytes: int
    pieces: tuple[Piece, ...]


def chunks_of(shard: OutputShard, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """The shard's file as consecutive chunks of `chunk_bytes` (the last one shorter)."""
    return chunks_over(_parts(shard), chunk_bytes)


def chunks_over(
    parts: Iterable[tuple[int, AnyPart | None, int]], chunk_bytes: int = CHUNK_BYTES
) -> Iterator[Chunk]:
    """The same for any file: `parts` are (tensor, part, bytes) in the order of the file."""
    offset, filled = 0, 0
    pieces: list[Piece] = []
    for tensor, part, total in parts:
        start = 0
        while start < total:
            count = min(total - start, chunk_bytes - filled)
            pieces.append(Piece(tensor, part, start, filled, count))
            start += count
            filled += count
            if filled == chunk_bytes:
                yield Chunk(offset, filled, tuple(pieces))
                offset, filled, pieces = offset + filled, 0, []
    if filled:
        yield Chunk(offset, filled, tuple(pieces))


def _parts(shard: OutputShard) -> Iterator[tuple[int, AnyPart | None, int]]:
    yield -1, None, len(shard.header)
    for number, tensor in enumerate(shard.tensors):
        for part in tensor.parts:
            yield number, part, part.nbytes
