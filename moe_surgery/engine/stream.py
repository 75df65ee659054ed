"""A bounded pipeline: several threads fill chunks, the caller consumes them in order, others write."""

from __future__ import annotations

import mmap
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from moe_surgery.checkpoint.direct_file import io_buffer
from moe_surgery.engine.chunks import CHUNK_BYTES, Chunk

__all__ = ["Stage", "stream"]

# More reads in flight than cores, since they mostly wait; few enough to bound their buffers.
FEWEST_WORKERS: Final = 4
MOST_WORKERS: Final = 8
WAITING_TO_WRITE: Final = 1

Stage = Callable[[Chunk, memoryview], None]


def stream(
    chunks: Iterable[Chunk],
    fill: Stage,
    consume: Stage,
    write: Stage | None = None,
    *,
    workers: int | None = None,
    writers: int = 1,
    abort: Callable[[], None] | None = None,
) -> None:
    """Run every chunk through `fill`, `consume` and `write`, all three overlapped.

    `fill(chunk, buffer)` runs in `workers` threads (default: one a core, 4 to 8), several chunks
    at a time; `consume` in the caller's thread, in the order of `chunks`; `write` in `writers` other
    threads, which begin in that order and end in any. A chunk's buffer is page-aligned and is reused after
    `write`. Memory is a fixed number of buffers of `CHUNK_BYTES`. The first error stops all stages and is
    raised; `abort`, if given, is called before to end the fills under way.
    """
    count = workers or max(FEWEST_WORKERS, min(MOST_WORKERS, os.cpu_count() or 1))
    free: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
    for _ in range(count + (writers + WAITING_TO_WRITE if write else 0)):
        free.put(io_buffer(CHUNK_BYTES))
    pending: deque[tuple[Chunk, mmap.mmap, Future[None]]] = deque()
    pool = ThreadPoolExecutor(count, "fill")
    writer = _Writer(write, free, writers) if write else None

    def consume_oldest() -> None:
        chunk, buffer, future = pending.popleft()
        future.result()
        consume(chunk, memoryview(buffer)[: chunk.nbytes])
        if writer is None:
            free.put(buffer)
        else:
            writer.put(chunk, buffer)

    try:
        for chunk in chunks:
            if len(pending) == count:
                consume_oldest()
            buffer = free.get()
            view = memoryview(buffer)[: chunk.nbytes]
            pending.append((chunk, buffer, pool.submit(fill, chunk, view)))
        while pending:
            consume_oldest()
        if writer is not None:
            writer.close()
    except BaseException:
        if abort is not None:
            abort()
        pool.shutdown(wait=True, cancel_futures=True)
        if writer is not None:
            writer.abandon()
        raise
    pool.shutdown()


class _Writer:
    """Threads that apply `write` and return buffers to `free`, even after a failure."""

    def __init__(self, write: Stage, free: queue.SimpleQueue[mmap.mmap], threads: int) -> None:
        self._write = write
        self._free = free
        self._queue: queue.SimpleQueue[tuple[Chunk, mmap.mmap] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._run, name="write", daemon=True) for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, chunk: Chunk, buffer: mmap.mmap) -> None:
        if self._error is not None:
            raise self._error
        self._queue.put((chunk, buffer))

    def close(self) -> None:
        """Wait for everything put; raise the first error."""
        self._end()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """Stop without writing what is queued."""
        self._error = self._error or RuntimeError("abandoned")
        self._end()

    def _end(self) -> None:
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            chunk, buffer = item
            if self._error is None:
                try:
                    self._write(chunk, memoryview(buffer)[: chunk.nbytes])
                except BaseException as error:
                    self._error = self._error or error
            self._free.put(buffer)
