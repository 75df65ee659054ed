"""Makes the bytes of chunks: positional reads for copies; what has to be converted is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from moe_surgery.checkpoint.shard import Shard
from moe_surgery.formats.encode_report import EncodeReport
from moe_surgery.surgery.chunks import Chunk, Piece
from moe_surgery.surgery.program import Copy, OutputShard, Span

if TYPE_CHECKING:
    from moe_surgery.surgery.conversions import Conversions

__all__ = ["Producer"]


class Producer:
    """Fills the chunks of one output shard from source shards. `fill` may run in several threads."""

    def __init__(self, shard: OutputShard, sources: Mapping[str, Shard]) -> None:
        self._header = shard.header
        self._shards = sources
        self._conversions = _conversions_of(shard, sources)

    def report(self) -> EncodeReport:
        """What conversion to MXFP4 lost."""
        return self._conversions.report() if self._conversions else EncodeReport()

    def fill(self, chunk: Chunk, buffer: memoryview) -> None:
        """Write the chunk's bytes to `buffer`. Raises InvalidInputError or OutputError."""
        try:
            for span, piece in _copies_joined(chunk.pieces):
                target = buffer[piece.position : piece.position + (span.nbytes if span else piece.nbytes)]
                if span is not None:
                    self._shards[span.shard].read_into(target, span.offset)
                elif piece.part is None:
                    target[:] = self._header[piece.start : piece.start + piece.nbytes]
                elif self._conversions:
                    self._conversions.fill(piece, target)
        except BaseException:
            if self._conversions:
                self._conversions.fail()
            raise


def _conversions_of(shard: OutputShard, sources: Mapping[str, Shard]) -> Conversions | None:
    """None where all is copied, which then needs no numpy: a third of the memory of such a job."""
    if all(isinstance(part, Copy) for tensor in shard.tensors for part in tensor.parts):
        return None
    from moe_surgery.surgery.conversions import Conversions

    return Conversions(sources)


def _copies_joined(pieces: tuple[Piece, ...]) -> Iterator[tuple[Span | None, Piece]]:
    """Every piece, runs of copies that follow one another in the source as one span with the first."""
    run: Span | None = None
    head: Piece | None = None
    for piece in pieces:
        span = _span(piece)
        if run and span and (run.shard, run.offset + run.nbytes) == (span.shard, span.offset):
            run = Span(run.shard, run.offset, run.nbytes + span.nbytes)
            continue
        if head is not None:
            yield run, head
        run, head = span, piece
    if head is not None:
        yield run, head


def _span(piece: Piece) -> Span | None:
    if not isinstance(piece.part, Copy):
        return None
    source = piece.part.span
    return Span(source.shard, source.offset + piece.start, piece.nbytes)
