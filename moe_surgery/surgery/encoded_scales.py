"""Holds MXFP4 scales, computed along with the blocks, until they are written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from moe_surgery.engine.spans import Span
from moe_surgery.formats import mxfp4

__all__ = ["EncodedScales", "PackedPart"]

_MISSING: Final = 0
_CLAIMED: Final = 1
_READY: Final = 2
_MOST_ROW_BYTES: Final = 1 << 21
"""Bytes of blocks that `consume` encodes at a time."""


class PackedPart(Protocol):
    """Blocks or scales of a weight [rows, columns] that is made from `values`."""

    @property
    def values(self) -> Span: ...

    @property
    def rows(self) -> int: ...

    @property
    def columns(self) -> int: ...


@dataclass(slots=True)
class _Weight:
    """Scales u8 [rows, groups], the state of each row, and the number of bytes not yet consumed."""

    scales: NDArray[np.uint8]
    state: NDArray[np.uint8]
    unconsumed: int


class EncodedScales:
    """Scales of the weights of one shard, for several threads.

    Rows are encoded once if chunks start in file order (blocks come before scales); any other order gives
    the same scales: `consume` encodes rows that no thread has claimed. A thread that holds a claim never
    waits, so waiting for a claimed row always ends.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._weights: dict[Span, _Weight] = {}
        self._consumed: set[Span] = set()

    @contextmanager
    def claim(self, part: PackedPart, first: int, last: int) -> Iterator[None]:
        """Claim rows [first, last) while the caller encodes and `put`s them; the others are released at the end."""
        with self._changed:
            weight = self._weight(part)
            ours = np.zeros(0, np.bool_)
            if weight is not None:
                ours = weight.state[first:last] == _MISSING
                weight.state[first:last][ours] = _CLAIMED
        try:
            yield
        finally:
            if weight is not None:
                with self._changed:
                    rows = weight.state[first:last]
                    rows[ours & (rows == _CLAIMED)] = _MISSING
                    self._changed.notify_all()

    def put(self, part: PackedPart, first: int, scales: NDArray[np.uint8]) -> None:
        """Keep scales u8 [n, groups] of rows [first, first + n) until they are consumed."""
        with self._changed:
            weight = self._weight(part)
            if weight is not None:
                weight.scales[first : first + len(scales)] = scales
                weight.state[first : first + len(scales)] = _READY
                self._changed.notify_all()

    def consume(
        self,
        part: PackedPart,
        start: int,
        out: NDArray[np.uint8],
        encode: Callable[[int, int], None],
    ) -> None:
        """Write scale bytes [start, start + len(out)) of the weight to `out`.

        `encode(first, last)` must claim, encode and put these rows. They are freed when all bytes
        of the weight have been consumed.
        """
        groups = part.columns // mxfp4.BLOCK_VALUES
        first, last = start // groups, -(-(start + len(out)) // groups)
        most = max(1, _MOST_ROW_BYTES // (groups * mxfp4.BLOCK_BYTES))
        while True:
            with self._changed:
                self._consumed.discard(part.values)
                weight = self._weight(part)
                assert weight is not None
                state = weight.state[first:last]
                missing = np.flatnonzero(state == _MISSING)
                if not missing.size:
                    if (state == _READY).all():
                        out[:] = weight.scales.reshape(-1)[start : start + len(out)]
                        self._count(part, weight, len(out))
                        return
                    self._changed.wait()
                    continue
            begin = first + int(missing[0])
            breaks = np.flatnonzero(np.diff(missing) != 1)
            run = int(breaks[0]) + 1 if breaks.size else missing.size
            encode(begin, begin + min(run, most))

    def _count(self, part: PackedPart, weight: _Weight, nbytes: int) -> None:
        weight.unconsumed -= nbytes
        if not weight.unconsumed:
            del self._weights[part.values]
            self._consumed.add(part.values)

    def _weight(self, part: PackedPart) -> _Weight | None:
        """The weight's entry, created if missing; None if all of its scales have been consumed."""
        if part.values in self._consumed:
            return None
        if part.values not in self._weights:
            scales = np.empty((part.rows, part.columns // mxfp4.BLOCK_VALUES), np.uint8)
            self._weights[part.values] = _Weight(scales, np.zeros(part.rows, np.uint8), scales.size)
        return self._weights[part.values]
