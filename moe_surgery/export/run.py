"""Executes a `GgufProgram`: one file streamed out, which appears under its name as the last act."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.staging import exclusive
from moe_surgery.checkpoint.writer import OutputFile, output_failure, remove_leftover
from moe_surgery.errors import DiskFullError, OutputError
from moe_surgery.export.producer import GgufProducer
from moe_surgery.export.program import GgufProgram
from moe_surgery.formats.encode_report import EncodeReport
from moe_surgery.surgery.chunks import AnyPart, Chunk, chunks_over
from moe_surgery.surgery.stream import stream

__all__ = ["write_gguf"]

Progress = Callable[[int], None]


def write_gguf(
    program: GgufProgram,
    checkpoint: Checkpoint,
    out: Path,
    *,
    overwrite: bool = False,
    ignore_free_space: bool = False,
    progress: Progress | None = None,
    ops: FileOps | None = None,
) -> EncodeReport:
    """Write `program` to the file `out`; returns what conversion to MXFP4 lost.

    `out` must have been cleared (`check_file_output`). `progress` is told bytes as they pass. Whatever
    happens, nothing half-written stands under the name; on any error nothing of the run is left.

    Raises DiskFullError before the first byte if the output cannot fit, and when space runs out
    meanwhile; OutputError, InvalidInputError for files that cannot be written or read.
    """
    ops = ops or FileOps()
    with exclusive(out):
        remove_leftover(OutputFile.temporary(out), ops)
        if not ignore_free_space:
            _check_space(program, out, ops)
        file = OutputFile(out, ops)
        try:
            producer = GgufProducer(program, checkpoint.shards)

            def take(chunk: Chunk, _: memoryview) -> None:
                if progress:
                    progress(chunk.nbytes)

            def finish(chunk: Chunk, buffer: memoryview) -> None:
                file.write(buffer, chunk.offset)

            stream(chunks_over(_parts(program)), producer.fill, take, finish)
            checkpoint.check_unchanged()
            file.publish(replace=overwrite)
        except BaseException:
            file.discard()
            raise
        try:
            ops.fsync_dir(out.parent)
        except OSError as error:
            raise output_failure(error, out.parent, "flush") from error
    return producer.report()


def _parts(program: GgufProgram) -> Iterator[tuple[int, AnyPart | None, int]]:
    yield -1, None, len(program.header)
    for number, tensor in enumerate(program.tensors):
        for part in tensor.parts:
            yield number, part, part.nbytes


def _check_space(program: GgufProgram, out: Path, ops: FileOps) -> None:
    try:
        free = ops.free_bytes(out.parent)
    except OSError as error:
        raise OutputError(f"{printable_path(out.parent)}: {error.strerror}") from error
    if program.nbytes > free:
        raise DiskFullError(
            f"{printable_path(out)}: needs {program.nbytes:,} bytes but its file system has {free:,} free; "
            "free some space, keep fewer experts, or pass `ignore_free_space=True`"
        )
