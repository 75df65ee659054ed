"""Digests of a shard file, whole and per tensor, taken as its chunks go by."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.files import open_regular, printable_path
from moe_surgery.errors import OutputError
from moe_surgery.surgery.chunks import CHUNK_BYTES, Chunk, chunks_of
from moe_surgery.surgery.manifest import FileRecord, TensorRecord
from moe_surgery.surgery.program import OutputShard
from moe_surgery.surgery.stream import stream

__all__ = ["FileDigest", "digest_file", "read_chunk"]


class FileDigest:
    """xxh3_128 of a shard file and of each of its tensors; feed it the chunks in order."""

    def __init__(self, shard: OutputShard) -> None:
        self._shard = shard
        self._whole = xxhash.xxh3_128()
        self._tensors = [xxhash.xxh3_128() for _ in shard.tensors]

    def update(self, chunk: Chunk, buffer: memoryview) -> None:
        self._whole.update(buffer)
        for piece in chunk.pieces:
            if piece.tensor >= 0:
                self._tensors[piece.tensor].update(buffer[piece.position : piece.position + piece.nbytes])

    def record(self) -> FileRecord:
        """The digests as the manifest holds them."""
        tensors = {
            t.name: TensorRecord(t.dtype, t.shape, state.hexdigest())
            for t, state in zip(self._shard.tensors, self._tensors, strict=True)
        }
        return FileRecord(self._shard.nbytes, self._whole.hexdigest(), tensors)


def digest_file(path: Path, shard: OutputShard, progress: Callable[[int], None], ops: FileOps) -> FileRecord:
    """Read a finished file that should be `shard` and take its digests.

    A file of another size gives a record of that size and an empty digest. Raises OutputError or
    InvalidInputError where it cannot be read.
    """
    fd = open_regular(path)
    try:
        if (size := os.fstat(fd).st_size) != shard.nbytes:
            return FileRecord(size, "")
        digest = FileDigest(shard)

        def take(chunk: Chunk, buffer: memoryview) -> None:
            digest.update(chunk, buffer)
            progress(chunk.nbytes)

        stream(chunks_of(shard), lambda chunk, buffer: read_chunk(fd, path, chunk.offset, buffer, ops), take)
        return digest.record()
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


def windows(size: int) -> Iterator[Chunk]:
    """Chunks over a file of `size` bytes of which nothing else is known."""
    for offset in range(0, size, CHUNK_BYTES):
        yield Chunk(offset, min(CHUNK_BYTES, size - offset), ())
