"""Writing an output file: check the space, stream the bytes, publish."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.writer import OutputFile, output_failure
from moe_surgery.engine.chunks import Chunk, FileLayout
from moe_surgery.engine.producer import Producer, produce
from moe_surgery.engine.reflink import Range, unshared
from moe_surgery.engine.stream import Stage
from moe_surgery.errors import DiskFullError, OutputError

__all__ = ["OnBytes", "check_space", "publish", "write_layout"]

WRITES_IN_FLIGHT: Final = 2
"""Direct writes: with one the disk waits while the next is prepared."""

OnBytes = Callable[[int], None]
"""Called with the number of bytes processed since the last call."""


def check_space(needed: int, out: Path, folder: Path, ops: FileOps) -> None:
    """Raise DiskFullError where the file system of `folder` has fewer than `needed` bytes free for `out`."""
    try:
        free = ops.free_bytes(folder)
    except OSError as error:
        where = error.filename or folder
        raise OutputError(f"{printable_path(where)}: {error.strerror}") from error
    if needed > free:
        raise DiskFullError(
            f"{printable_path(out)}: needs {needed:,} bytes but its file system has {free:,} free; "
            "free some space, keep fewer experts, or pass `ignore_free_space=True`"
        )


def write_layout(
    layout: FileLayout,
    producer: Producer,
    file: OutputFile,
    consume: Stage,
    *,
    shared: Sequence[Range] = (),
    start: int = 0,
    written: OnBytes = lambda _: None,
) -> None:
    """Stream the bytes of `layout`, made by `producer`, through `consume` to `file`.

    `shared` ranges, sorted and disjoint, are already in the file and not written, and so is all before `start`.
    `written` is called with the file position up to which all is written, in a thread that writes. On any error
    the file stays unpublished; the caller discards it.
    """
    beginning = _Beginning(start, written)

    def write(chunk: Chunk, buffer: memoryview) -> None:
        for begin, end in unshared(chunk, shared):
            file.write(buffer[begin - chunk.offset : end - chunk.offset], begin)
        beginning.add(chunk)

    file.reserve(layout.nbytes)
    producer.expect_slices()
    produce(layout, producer, consume, write, writers=WRITES_IN_FLIGHT, start=start)


class _Beginning:
    """Up to where a file is written, while its chunks are written in any order. Thread-safe."""

    def __init__(self, position: int, written: OnBytes) -> None:
        """`written` is called with the end of each chunk before which all is written, in order."""
        self._position = position
        self._written = written
        self._ends: dict[int, int] = {}
        self._lock = threading.Lock()

    def add(self, chunk: Chunk) -> None:
        with self._lock:
            self._ends[chunk.offset] = chunk.offset + chunk.nbytes
            while (end := self._ends.pop(self._position, None)) is not None:
                self._position = end
                self._written(end)


def publish(file: OutputFile, ops: FileOps, *, replace: bool = True) -> None:
    """Flush and rename `file`, then flush its folder; discard the file if that fails."""
    try:
        file.publish(replace=replace)
    except BaseException:
        file.discard()
        raise
    folder = file.path.parent
    try:
        ops.fsync_dir(folder)
    except OSError as error:
        raise output_failure(error, folder, "flush") from error
