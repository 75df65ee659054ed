"""Digests of a file and of its tensors, computed chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import Final

import xxhash

from moe_surgery.checkpoint.source import ByteSource
from moe_surgery.engine.chunks import Chunk, FileLayout, chunks_of
from moe_surgery.engine.stream import stream

__all__ = ["FileDigest", "digest_chunks", "digest_file", "digest_start"]


_EMPTY: Final = xxhash.xxh3_128().hexdigest()


class FileDigest:
    """xxh3_128 of a file and of each of its `tensors`, updated with the chunks in order.

    Tensors follow one another, so only the state of one is held at a time.
    """

    def __init__(self, tensors: int = 0) -> None:
        self._whole = xxhash.xxh3_128()
        self._tensors = [_EMPTY] * tensors
        self._state = xxhash.xxh3_128()
        self._current = -1

    def update(self, chunk: Chunk, buffer: memoryview) -> None:
        self._whole.update(buffer)
        for piece in chunk.slices:
            if piece.tensor < 0:
                continue
            if piece.tensor != self._current:
                self._finish()
                self._current = piece.tensor
            self._state.update(piece.of(buffer))

    def _finish(self) -> None:
        if self._current >= 0:
            self._tensors[self._current] = self._state.hexdigest()
            self._state.reset()

    @property
    def whole(self) -> str:
        """The digest of all bytes so far, as 32 hexadecimal digits."""
        return self._whole.hexdigest()

    @property
    def tensors(self) -> list[str]:
        """The digests of the tensors, in the order of the file."""
        digests = list(self._tensors)
        if self._current >= 0:
            digests[self._current] = self._state.hexdigest()
        return digests


def digest_file(source: ByteSource, layout: FileLayout, progress: Callable[[int], None]) -> FileDigest | None:
    """The digests of a finished file that should be `layout`; None if its size differs.

    Raises OutputError or InvalidInputError where it cannot be read.
    """
    if source.size != layout.nbytes:
        return None
    return digest_chunks(source, chunks_of(layout), FileDigest(len(layout.tensors)), progress)


def digest_start(
    source: ByteSource, layout: FileLayout, nbytes: int, progress: Callable[[int], None]
) -> FileDigest | None:
    """The digests of the first `nbytes`, a multiple of the chunk size, of an unfinished file; None if it is shorter.

    Raises as `digest_file`.
    """
    if source.size < nbytes:
        return None
    chunks = takewhile(lambda chunk: chunk.offset < nbytes, chunks_of(layout))
    return digest_chunks(source, chunks, FileDigest(len(layout.tensors)), progress)


def digest_chunks(
    source: ByteSource, chunks: Iterable[Chunk], digest: FileDigest, progress: Callable[[int], None]
) -> FileDigest:
    """`digest` after all `chunks` of the file; raises as `digest_file`."""

    def fill(chunk: Chunk, buffer: memoryview) -> None:
        source.read_into(chunk.offset, buffer)

    def consume(chunk: Chunk, buffer: memoryview) -> None:
        digest.update(chunk, buffer)
        progress(chunk.nbytes)

    stream(chunks, fill, consume)
    return digest
