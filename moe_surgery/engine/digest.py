"""Digests of a file, whole and per tensor, taken as its chunks pass."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import xxhash

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.files import open_regular, printable_path
from moe_surgery.engine.chunks import Chunk, FileLayout, chunks_of
from moe_surgery.engine.stream import stream
from moe_surgery.errors import OutputError

__all__ = ["FileDigest", "digest_file", "read_chunk"]


class FileDigest:
    """xxh3_128 of a file and of each of its `tensors`; feed it the chunks in order."""

    def __init__(self, tensors: int = 0) -> None:
        self._whole = xxhash.xxh3_128()
        self._tensors = [xxhash.xxh3_128() for _ in range(tensors)]

    def update(self, chunk: Chunk, buffer: memoryview) -> None:
        self._whole.update(buffer)
        for piece in chunk.slices:
            if piece.tensor >= 0:
                self._tensors[piece.tensor].update(piece.of(buffer))

    @property
    def whole(self) -> str:
        """The digest of all bytes so far, as 32 hexadecimal digits."""
        return self._whole.hexdigest()

    @property
    def tensors(self) -> list[str]:
        """The digests of the tensors, in the order of the file."""
        return [state.hexdigest() for state in self._tensors]


def digest_file(
    path: Path, layout: FileLayout, progress: Callable[[int], None], ops: FileOps
) -> FileDigest | None:
    """The digests of a finished file that should be `layout`; None where its size is another.

    Raises OutputError or InvalidInputError where it cannot be read.
    """
    fd = open_regular(path)
    try:
        if os.fstat(fd).st_size != layout.nbytes:
            return None
        digest = FileDigest(len(layout.tensors))

        def fill(chunk: Chunk, buffer: memoryview) -> None:
            read_chunk(fd, path, chunk.offset, buffer, ops)

        def consume(chunk: Chunk, buffer: memoryview) -> None:
            digest.update(chunk, buffer)
            progress(chunk.nbytes)

        stream(chunks_of(layout), fill, consume)
        return digest
    finally:
        os.close(fd)


def read_chunk(fd: int, path: Path, offset: int, buffer: memoryview, ops: FileOps) -> None:
    """Fill `buffer` from `offset` of `fd`. Raises OutputError naming `path`."""
    done = 0
    while done < len(buffer):
        try:
            count = ops.pread_into(fd, buffer[done:], offset + done)
        except OSError as error:
            raise OutputError(f"{printable_path(path)}: cannot read at {offset}: {error.strerror}") from error
        if not count:
            raise OutputError(f"{printable_path(path)}: ends before byte {offset + len(buffer)}")
        done += count
