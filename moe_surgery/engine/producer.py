"""Fills chunks: copies by positional reads, literal bytes, everything else by a converter."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import dropwhile
from typing import Final, Protocol

from moe_surgery.checkpoint.shard import OpenFile
from moe_surgery.engine.chunks import Chunk, FileLayout, PartSlice, chunks_of
from moe_surgery.engine.spans import Copy, Literal, Span
from moe_surgery.engine.stream import Stage, stream
from moe_surgery.formats.encode_report import EncodeReport

__all__ = ["Converter", "Producer", "produce"]


EXPECTED_CHUNKS: Final = 6
"""Chunks whose bytes are requested before there is a buffer for them; answers wait in the socket."""


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
        self, layout: FileLayout, sources: Mapping[str, OpenFile], converter: Converter | None = None
    ) -> None:
        """`converter` None: every part is a `Copy` or a `Literal`."""
        self._header = layout.header
        self._shards = sources
        self._converter = converter
        self.workers = max((s.source.concurrent_reads or 0 for s in sources.values()), default=0) or None
        """Chunks to fill at a time, where the sources have a preference."""

    def cancel(self) -> None:
        """End calls of `fill` that wait for bytes, in other threads, with an error."""
        for shard in self._shards.values():
            shard.source.cancel()

    def expect_slices(self) -> None:
        """Say that most of the output is copied, so that its source is best read past the page cache.

        That takes 2 MiB a thread. Raises InvalidInputError if a source has changed since it was opened.
        """
        for shard in self._shards.values():
            shard.source.expect_slices()

    def expect(self, chunk: Chunk) -> None:
        """Say that `chunk` will soon be filled."""
        ranges: dict[str, list[tuple[int, int]]] = {}
        for span, _ in _copies_merged(chunk.slices):
            if span is not None:
                ranges.setdefault(span.shard, []).append((span.offset, span.nbytes))
        for name, wanted in ranges.items():
            self._shards[name].source.expect(wanted)

    def report(self) -> EncodeReport:
        """What conversion to MXFP4 lost."""
        return EncodeReport() if self._converter is None else self._converter.report()

    def fill(self, chunk: Chunk, buffer: memoryview) -> None:
        """Write the chunk's bytes to `buffer`. Raises InvalidInputError or OutputError."""
        wanted: dict[str, list[tuple[int, memoryview]]] = {}
        for span, piece in _copies_merged(chunk.slices):
            if span is not None:
                target = buffer[piece.position : piece.position + span.nbytes]
                wanted.setdefault(span.shard, []).append((span.offset, target))
            elif piece.part is None:
                piece.of(buffer)[:] = self._header[piece.start : piece.start + piece.nbytes]
            elif isinstance(piece.part, Literal):
                piece.of(buffer)[:] = piece.part.content[piece.start : piece.start + piece.nbytes]
            elif self._converter is None:
                raise TypeError(f"{type(piece.part).__name__} is not a copy, and there is no converter")
            else:
                self._converter.fill(piece, piece.of(buffer))
        for name, pieces in wanted.items():
            self._shards[name].read_many(pieces)


def produce(
    layout: FileLayout,
    producer: Producer,
    consume: Stage,
    write: Stage | None = None,
    *,
    writers: int = 1,
    start: int = 0,
) -> None:
    """Stream the bytes of `layout`, made by `producer`, through `consume` and `write`; see `stream`.

    Chunks before the file position `start` are left out.
    """
    chunks: Iterator[Chunk] = chunks_of(layout)
    if start:
        chunks = dropwhile(lambda chunk: chunk.offset < start, chunks)
    if producer.workers is not None:
        chunks = _announced(chunks, producer)
    workers = producer.workers
    stream(chunks, producer.fill, consume, write, workers=workers, writers=writers, abort=producer.cancel)


def _announced(chunks: Iterable[Chunk], producer: Producer) -> Iterator[Chunk]:
    """`chunks`, of which the producer learns in advance."""
    waiting: deque[Chunk] = deque()
    for chunk in chunks:
        producer.expect(chunk)
        waiting.append(chunk)
        if len(waiting) > EXPECTED_CHUNKS:
            yield waiting.popleft()
    yield from waiting


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
