"""Copies that share disk blocks with the source instead of being written (reflink)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from moe_surgery.checkpoint.shard import OpenFile
from moe_surgery.checkpoint.writer import OutputFile
from moe_surgery.engine.chunks import Chunk, FileLayout, parts_of
from moe_surgery.engine.spans import Copy, Span

__all__ = ["CLONE_BLOCK", "Range", "share_extents", "unshared"]

CLONE_BLOCK: Final = 4096
"""Bytes. Source and target offsets must be equal modulo the block size of the file system, nearly always this."""

Range = tuple[int, int]
"""[begin, end) of an output file, in bytes."""


def share_extents(
    layout: FileLayout, file: OutputFile, sources: Mapping[str, OpenFile]
) -> tuple[list[Range], bool]:
    """Reflink the block-aligned ranges of copies whose offsets in source and output are equal modulo the block size.

    Returns the ranges of `file` that need not be written, sorted, and whether the file system supports it.
    """
    shared: list[Range] = []
    for span, offset in _merged_copies(layout):
        if (span.offset - offset) % CLONE_BLOCK:
            continue
        begin = offset + -offset % CLONE_BLOCK
        end = (offset + span.nbytes) // CLONE_BLOCK * CLONE_BLOCK
        if begin >= end:
            continue
        source = sources[span.shard].source
        if not file.clone(source, span.offset + begin - offset, end - begin, begin):
            return shared, False
        shared.append((begin, end))
    return shared, True


def unshared(chunk: Chunk, shared: Sequence[Range]) -> Iterator[Range]:
    """The parts of the chunk's file range that `shared`, sorted and disjoint, does not cover."""
    position, stop = chunk.offset, chunk.offset + chunk.nbytes
    for begin, end in shared:
        if end <= position:
            continue
        if begin >= stop:
            break
        if begin > position:
            yield position, begin
        position = max(position, end)
    if position < stop:
        yield position, stop


def _merged_copies(layout: FileLayout) -> Iterator[tuple[Span, int]]:
    """Every copy of the file with its file offset, those adjacent in both files merged."""
    offset = start = 0
    run: Span | None = None
    for _, part, nbytes in parts_of(layout):
        span = part.span if isinstance(part, Copy) else None
        merged = run.then(span) if run and span else None
        if merged is not None:
            run = merged
        else:
            if run:
                yield run, start
            run, start = span, offset
        offset += nbytes
    if run:
        yield run, start
