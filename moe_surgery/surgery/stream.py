"""A bounded pipeline: chunks made by several threads, taken in order, finished by one more thread."""

from __future__ import annotations

import mmap
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from moe_surgery.surgery.chunks import CHUNK_BYTES, Chunk

__all__ = ["stream"]

# More reads in flight than there are cores, since they mostly wait; few enough for their buffers.
FEWEST_WORKERS: Final = 4
MOST_WORKERS: Final = 8
WAITING_TO_FINISH: Final = 2

Fill = Callable[[Chunk, memoryview], None]


def stream(
    chunks: Iterable[Chunk], fill: Fill, take: Fill, finish: Fill | None = None, *, workers: int | None = None
) -> None:
    """Run every chunk through `fill`, `take` and `finish`, all three overlapped.

    `fill(chunk, buffer)` runs in `workers` threads (default: one a core, 4 to 8), several chunks
    at a time; `take` in the caller's thread, in the order of `chunks`; `finish` in a thread of its
    own, in order. A chunk's buffer is page-aligned and is used again after `finish`. Memory is a
    fixed number of buffers of `CHUNK_BYTES`. The first error ends everything and is raised.
    """
    count = workers or max(FEWEST_WORKERS, min(MOST_WORKERS, os.cpu_count() or 1))
    free: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
    for _ in range(count + (WAITING_TO_FINISH if finish else 0)):
        free.put(mmap.mmap(-1, CHUNK_BYTES))
    pending: deque[tuple[Chunk, mmap.mmap, Future[None]]] = deque()
    pool = ThreadPoolExecutor(count, "fill")
    finisher = _Finisher(finish, free) if finish else None

    def take_oldest() -> None:
        chunk, buffer, future = pending.popleft()
        future.result()
        take(chunk, memoryview(buffer)[: chunk.nbytes])
        if finisher is None:
            free.put(buffer)
        else:
            finisher.put(chunk, buffer)

    try:
        for chunk in chunks:
            if len(pending) == count:
                take_oldest()
            buffer = free.get()
            view = memoryview(buffer)[: chunk.nbytes]
            pending.append((chunk, buffer, pool.submit(fill, chunk, view)))
        while pending:
            take_oldest()
        if finisher is not None:
            finisher.close()
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        if finisher is not None:
            finisher.abandon()
        raise
    pool.shutdown()


class _Finisher:
    """One thread that applies `finish` in order and returns buffers to `free`, even after a failure."""

    def __init__(self, finish: Fill, free: queue.SimpleQueue[mmap.mmap]) -> None:
        self._finish = finish
        self._free = free
        self._queue: queue.SimpleQueue[tuple[Chunk, mmap.mmap] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="finish", daemon=True)
        self._thread.start()

    def put(self, chunk: Chunk, buffer: mmap.mmap) -> None:
        if self._error is not None:
            raise self._error
        self._queue.put((chunk, buffer))

    def close(self) -> None:
        """Wait for everything put; raise the first error."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """Stop without finishing what waits."""
        self._error = self._error or RuntimeError("abandoned")
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            chunk, buffer = item
            if self._error is None:
                try:
                    self._finish(chunk, memoryview(buffer)[: chunk.nbytes])
                except BaseException as error:
                    self._error = error
            self._free.put(buffer)
