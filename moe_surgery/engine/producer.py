"""Fills chunks: copies by positional reads, everything else by a converter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from moe_surgery.checkpoint.shard import Shard
from moe_surgery.engine.chunks import Chunk, FileLayout, PartSlice
from moe_surgery.engine.spans import Copy, Span
from moe_surgery.formats.encode_report import EncodeReport

__all__ = ["Converter", "Producer"]


class Converter(Protocol):
    """Fills the parts of a file that are converted rather than copied.

    `fill` may run in several threads, in any order.
    """

    def fill(self, piece: PartSlice, target: memoryview) -> None:
        """Write the bytes of `piece` to `target`. Raises InvalidInputError or OutputError."""

    def report(self) -> EncodeReport:
        """What conversion to MXFP4 lost."""


class Producer:
    """Fills the chunks of one output file from source shards. `fill` may run in several threads, in any order."""

    def __init__(
        self, layout: FileLayout, sources: Mapping[str, Shard], converter: Converter | None = None
    ) -> None:
        """`converter` None: every part is a `Copy`."""
        self._header = layout.header
        self._shards = sources
        self._converter = converter

    def report(self) -> EncodeReport:
        """What conversion to MXFP4 lost."""
        return EncodeReport() if self._converter is None else self._converter.report()

    def fill(self, chunk: Chunk, buffer: memoryview) -> None:
        """Write the chunk's bytes to `buffer`. Raises InvalidInputError or OutputError."""
        for span, piece in _copies_merged(chunk.slices):
            if span is not None:
                target = buffer[piece.position : piece.position + span.nbytes]
                self._shards[span.shard].read_into(span.offset, target)
            elif piece.part is None:
                piece.of(buffer)[:] = self._header[piece.start : piece.start + piece.nbytes]
            elif self._converter is None:
                raise TypeError(f"{type(piece.part).__name__} is not a copy, and there is no converter")
            else:
                self._converter.fill(piece, piece.of(buffer))


def _copies_merged(slices: tuple[PartSlice, ...]) -> Iterator[tuple[Span | None, PartSlice]]:
    """Every slice, runs of copies that are adjacent in the source as one span with the first."""
    run: Span | None = None
    head: PartSlice | None = None
    for piece in slices:
        span = _span(piece)
        merged = run.then(span) if run and span else None
        if merged is not None:
            run = merged
            continue
        if head is not None:
            yield run, head
        run, head = span, piece
    if head is not None:
        yield run, head


def _span(piece: PartSlice) -> Span | None:
    if not isinstance(piece.part, Copy):
        return None
    source = piece.part.span
    return Span(source.shard, source.offset + piece.start, piece.nbytes)
