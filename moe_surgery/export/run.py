"""Executes a `GgufProgram`: writes one file, renamed as the last step."""

from __future__ import annotations

from pathlib import Path

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.staging import output_lock
from moe_surgery.checkpoint.writer import OutputFile, remove_leftover
from moe_surgery.engine.chunks import Chunk
from moe_surgery.engine.fetch import OnFetch, to_fetch
from moe_surgery.engine.output import OnBytes, check_space, publish, write_layout
from moe_surgery.engine.producer import Producer
from moe_surgery.export.conversions import GgufConversions
from moe_surgery.export.program import GgufProgram
from moe_surgery.formats.encode_report import EncodeReport

__all__ = ["write_gguf"]


def write_gguf(
    program: GgufProgram,
    checkpoint: Checkpoint,
    out: Path,
    *,
    overwrite: bool = False,
    ignore_free_space: bool = False,
    progress: OnBytes | None = None,
    on_fetch: OnFetch | None = None,
    ops: FileOps | None = None,
) -> EncodeReport:
    """Write `program` to the file `out`; returns what conversion to MXFP4 lost.

    `out` must have passed `check_output_file`. `progress` is called with bytes processed, `on_fetch` with
    what is fetched over a network, before it is. The file appears whole or not at all; on any error nothing is
    left behind.

    Raises DiskFullError before the first byte if the output does not fit, and when space runs out
    during the run; OutputError, InvalidInputError for files that cannot be written or read.
    """
    ops = ops or FileOps()
    with output_lock(out):
        remove_leftover(OutputFile.temporary(out), ops)
        if not ignore_free_space:
            check_space(program.nbytes, out, out.parent, ops)
        fetch = to_fetch([program], [], checkpoint) if on_fetch else None
        if on_fetch and fetch:
            on_fetch(fetch)
        file = OutputFile(out, ops)
        try:
            producer = Producer(program, checkpoint.shards, GgufConversions(checkpoint.shards))

            def consume(chunk: Chunk, _: memoryview) -> None:
                if progress:
                    progress(chunk.nbytes)

            write_layout(program, producer, file, consume)
            checkpoint.check_unchanged()
        except BaseException:
            file.discard()
            raise
        publish(file, ops, replace=overwrite)
    return producer.report()
