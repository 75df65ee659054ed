"""Regions of source shards, shared by threads: mapped, or read once where the source has no mapping."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Final

import numpy as np
import numpy.typing as npt

from moe_surgery.checkpoint.shard import OpenFile
from moe_surgery.engine.spans import Span

__all__ = ["MappedRegions"]

READ_REGIONS: Final = 4
READ_BYTES: Final = 32 << 20
"""Regions read from sources without a mapping that are kept: the last four (two experts' blocks and scales, since
chunks go through experts in order), more of them while they are small."""


class MappedRegions:
    """Regions of `shards`; thread-safe."""

    def __init__(self, shards: Mapping[str, OpenFile]) -> None:
        self._shards = shards
        self._lock = threading.Lock()
        self._users: Counter[Span] = Counter()
        self._read: OrderedDict[Span, Future[memoryview]] = OrderedDict()

    @contextmanager
    def open(self, span: Span) -> Iterator[npt.NDArray[np.uint8]]:
        """The bytes of `span`; mapped pages are freed when no thread uses them any more."""
        shard = self._shards[span.shard]
        with self._lock:
            self._users[span] += 1
        try:
            mapped = shard.source.region(span.offset, span.nbytes)
            yield np.frombuffer(self._read_once(span, shard) if mapped is None else mapped, np.uint8)
        finally:
            with self._lock:
                self._users[span] -= 1
                if not self._users[span]:
                    del self._users[span]
                    shard.release(span.offset, span.nbytes)

    def _read_once(self, span: Span, shard: OpenFile) -> memoryview:
        """The bytes of `span`, read by the first thread; others wait for it."""
        with self._lock:
            reading = self._read.get(span)
            first = reading is None
            if reading is None:
                reading = self._read[span] = Future()
                while len(self._read) > READ_REGIONS and sum(s.nbytes for s in self._read) > READ_BYTES:
                    self._read.popitem(last=False)
            self._read.move_to_end(span)
        if first:
            try:
                buffer = memoryview(bytearray(span.nbytes))
                shard.read_into(span.offset, buffer)
                reading.set_result(buffer)
            except BaseException as error:
                reading.set_exception(error)
        return reading.result()
