"""Mapped regions of source shards, shared by threads and freed by the last one."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from moe_surgery.checkpoint.shard import Shard
from moe_surgery.engine.spans import Span

__all__ = ["MappedRegions"]


class MappedRegions:
    """Regions of `shards`; thread-safe."""

    def __init__(self, shards: Mapping[str, Shard]) -> None:
        self._shards = shards
        self._lock = threading.Lock()
        self._users: Counter[Span] = Counter()

    @contextmanager
    def open(self, span: Span) -> Iterator[npt.NDArray[np.uint8]]:
        """The mapped bytes of `span`; its pages are freed when no thread uses it any more."""
        shard = self._shards[span.shard]
        with self._lock:
            self._users[span] += 1
        try:
            yield np.frombuffer(shard.region(span.offset, span.nbytes), np.uint8)
        finally:
            with self._lock:
                self._users[span] -= 1
                if not self._users[span]:
                    del self._users[span]
                    shard.release(span.offset, span.nbytes)
