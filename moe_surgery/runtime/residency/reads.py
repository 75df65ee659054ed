"""Reads in the background: several in flight, the urgent ones first."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from moe_surgery.checkpoint.direct_file import BLOCK, DirectFile, whole_blocks

__all__ = ["AHEAD", "FILL", "URGENT", "Load", "Read", "Reads", "room"]

PIECE_BYTES: Final = 2 << 20
"""A read is cut into pieces of at most this many bytes, which several threads read at once. What is under way when an
urgent read comes delays it, so they are no larger than the disk's full rate needs."""
THREADS: Final = 4

URGENT, AHEAD, FILL = range(3)
"""Classes of loads: those that are waited for, those that are likely to be needed next, all others."""


def room(nbytes: int) -> int:
    """Bytes that a read of `nbytes` takes in memory, wherever it lies in its file: whole blocks around it."""
    return whole_blocks(BLOCK - 1, nbytes)[1]


@dataclass(frozen=True, slots=True)
class Read:
    """`nbytes` bytes at `offset` of `file` into `buffer`, `room(nbytes)` bytes at the address of a block.

    The first of them lands at `offset % BLOCK` of the buffer.
    """

    file: DirectFile
    offset: int
    nbytes: int
    buffer: memoryview

    def pieces(self) -> Iterator[Read]:
        """The same as reads of whole blocks, the last one down to the last byte needed."""
        start, end = self.offset - self.offset % BLOCK, self.offset + self.nbytes
        for at in range(start, end, PIECE_BYTES):
            part = min(PIECE_BYTES, end - at)
            into = at - start
            yield Read(self.file, at, part, self.buffer[into : into + whole_blocks(0, part)[1]])


class Load:
    """Several reads that are of use only together."""

    def __init__(self, reads: Sequence[Read], kind: int) -> None:
        self.kind = kind
        self.nbytes = sum(read.nbytes for read in reads)
        self.waiting = deque(piece for read in reads for piece in read.pieces())
        self.unfinished = len(self.waiting)
        self.error: Exception | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing of it is read any more; then it is whole, unless it was cancelled or has an error."""
        return not self.unfinished


class Reads:
    """Threads that read the pieces of loads, class by class, each in the order of `start`.

    The threads end when this is closed; they are daemons, so that an interrupted process need not wait for a slow
    disk. Only one thread calls the methods.
    """

    def __init__(self, threads: int = THREADS) -> None:
        lock = threading.Lock()
        self._added, self._ended = threading.Condition(lock), threading.Condition(lock)
        self._loads: tuple[deque[Load], ...] = (deque(), deque(), deque())
        self._closed = False
        self.nbytes = 0
        """Bytes read so far."""
        for number in range(threads):
            threading.Thread(target=self._work, name=f"read-{number}", daemon=True).start()

    def start(self, load: Load) -> None:
        """Read `load` after the others of its class."""
        with self._added:
            self._loads[load.kind].append(load)
            self._added.notify(load.unfinished)

    def hurry(self, load: Load) -> None:
        """Make a load urgent."""
        with self._added:
            if load.kind != URGENT and load.waiting:
                self._loads[load.kind].remove(load)
                self._loads[URGENT].append(load)
            load.kind = URGENT

    def cancel(self, load: Load) -> int:
        """Forget the pieces of a load that have not begun; their bytes. It ends with those that are being read."""
        with self._added:
            dropped = sum(piece.nbytes for piece in load.waiting)
            if load.waiting:
                self._drop(load)
            return dropped

    def wait(self, loads: Sequence[Load]) -> Load:
        """The first of `loads` to finish, at once if one has. Raises nothing: see `Load.error`."""
        with self._ended:
            while True:
                for load in loads:
                    if load.finished:
                        return load
                self._ended.wait()

    def read(self, reads: Sequence[Read]) -> None:
        """Read all of `reads`, and return when they are there. Raises as `DirectFile.read`."""
        load = Load(reads, URGENT)
        self.start(load)
        self.wait([load])
        if load.error is not None:
            raise load.error

    def close(self) -> None:
        """End the threads after the pieces that they are reading."""
        with self._added:
            self._closed = True
            self._added.notify_all()

    def _drop(self, load: Load) -> None:
        """Forget the pieces of a load that wait, of which there is at least one."""
        load.unfinished -= len(load.waiting)
        load.waiting.clear()
        self._loads[load.kind].remove(load)

    def _take(self) -> tuple[Load, Read] | None:
        """The next piece; None when closed."""
        with self._added:
            while not self._closed:
                for loads in self._loads:
                    if loads:
                        load = loads[0]
                        piece = load.waiting.popleft()
                        if not load.waiting:
                            loads.popleft()
                        return load, piece
                self._added.wait()
            return None

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            load, piece = taken
            error: Exception | None = None
            try:
                piece.file.read(piece.offset, piece.buffer, piece.nbytes)
            except Exception as raised:  # the thread that waits for the load raises it
                error = raised
            with self._ended:
                self.nbytes += piece.nbytes
                load.unfinished -= 1
                if error is not None:
                    load.error = load.error or error
                    if load.waiting:
                        self._drop(load)
                if load.finished:
                    self._ended.notify_all()
