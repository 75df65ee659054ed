"""Ranges of source bytes, and the part of an output file that copies one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

__all__ = ["Copy", "Literal", "Span", "coalesce"]


class Span(NamedTuple):
    """`nbytes` bytes at file position `offset` of the source shard named `shard`."""

    shard: str
    offset: int
    nbytes: int

    def then(self, other: Span) -> Span | None:
        """Both as one span where `other` begins where this one ends, else None."""
        if (self.shard, self.offset + self.nbytes) != (other.shard, other.offset):
            return None
        return Span(self.shard, self.offset, self.nbytes + other.nbytes)


class Copy(NamedTuple):
    """Source bytes, unchanged."""

    span: Span

    @property
    def nbytes(self) -> int:
        return self.span.nbytes

    @property
    def spans_read(self) -> tuple[Span, ...]:
        return (self.span,)


class Literal(NamedTuple):
    """Bytes that come from no source; a few megabytes at most, as they are held in memory."""

    content: bytes

    @property
    def nbytes(self) -> int:
        return len(self.content)

    @property
    def spans_read(self) -> tuple[Span, ...]:
        return ()


def coalesce(spans: Iterable[Span]) -> Iterator[Span]:
    """The same bytes in the same order, adjacent spans of one shard merged."""
    last: Span | None = None
    for span in spans:
        merged = last.then(span) if last is not None else None
        if last is not None and merged is None:
            yield last
        last = merged or span
    if last is not None:
        yield last
