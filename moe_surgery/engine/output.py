"""Writing an output file: check the space, stream the bytes, publish."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.writer import OutputFile, output_failure
from moe_surgery.engine.chunks import Chunk, FileLayout
from moe_surgery.engine.producer import Producer, produce
from moe_surgery.engine.reflink import Range, unshared
from moe_surgery.engine.stream import Stage
from moe_surgery.errors import DiskFullError, OutputError

__all__ = ["OnBytes", "check_space", "publish", "write_layout"]

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
    `written` is called with the file position up to which all is written, in the thread that writes. On any error
    the file stays unpublished; the caller discards it.
    """

    def write(chunk: Chunk, buffer: memoryview) -> None:
        for begin, end in unshared(chunk, shared):
            file.write(buffer[begin - chunk.offset : end - chunk.offset], begin)
        written(chunk.offset + chunk.nbytes)

    produce(layout, producer, consume, write, start=start)


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
