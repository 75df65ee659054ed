"""Reads in the background: several in flight, the urgent ones first."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from moe_surgery.checkpoint.direct_file import BLOCK, DirectFile, whole_blocks
from moe_surgery.errors import MoeSurgeryError
from moe_surgery.formats.native import native_module

__all__ = [
    "AHEAD",
    "FILL",
    "URGENT",
    "Load",
    "NativeReads",
    "PythonReads",
    "Read",
    "Reads",
    "open_reads",
    "room",
]

PIECE_BYTES: Final = 1 << 20
"""A read is cut into pieces of at most this many bytes, which several threads read at once. What is under way when an
urgent read comes delays it, so they are no larger than the disk's full rate needs."""
THREADS: Final = 4
WAIT_MILLISECONDS: Final = 100

URGENT, AHEAD, FILL = range(3)
"""Classes of loads: those that are waited for, those that are likely to be needed next, all others."""


def room(nbytes: int) -> int:
    """Bytes that a read of `nbytes` takes in memory, wherever it lies in its file: whole blocks around it."""
    return whole_blocks(BLOCK - 1, nbytes)[1]


@dataclass(frozen=True, slots=True)
class Read:
    """`nbytes` bytes at `offset` of `file` into `buffer`, `room(nbytes)` bytes at `address`, that of a block.

    The first of them lands at `offset % BLOCK` of the buffer.
    """

    file: DirectFile
    offset: int
    nbytes: int
    buffer: memoryview
    address: int

    def pieces(self) -> Iterator[Read]:
        """The same as reads of whole blocks, the last one down to the last byte needed."""
        start, end = self.offset - self.offset % BLOCK, self.offset + self.nbytes
        for at in range(start, end, PIECE_BYTES):
            part, into = min(PIECE_BYTES, end - at), at - start
            buffer = self.buffer[into : into + whole_blocks(0, part)[1]]
            yield Read(self.file, at, part, buffer, self.address + into)


class Load:
    """Several reads that are of use only together."""

    def __init__(self, reads: Sequence[Read], kind: int) -> None:
        self.kind = kind
        self.nbytes = sum(read.nbytes for read in reads)
        self.pieces = [piece for read in reads for piece in read.pieces()]
        self.waiting = deque(self.pieces)
        self.unfinished = len(self.pieces)
        self.error: Exception | None = None
        self.poll: Callable[[], None] | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing of it is read any more; then it is whole, unless it was cancelled or has an error."""
        if self.poll is not None:
            self.poll()
        return not self.unfinished


class Reads(ABC):
    """Threads that read the pieces of loads, class by class, each class in the order of `start`.

    One thread calls the methods.
    """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes read so far."""

    @abstractmethod
    def start(self, load: Load) -> None:
        """Read `load` after the others of its class."""

    @abstractmethod
    def hurry(self, load: Load) -> None:
        """Make a load urgent."""

    @abstractmethod
    def cancel(self, load: Load) -> int:
        """Forget the pieces of a load that have not begun; their bytes. It ends with those that are being read."""

    @abstractmethod
    def wait(self, loads: Sequence[Load]) -> Load:
        """The first of `loads` to finish, at once if one has. Raises nothing: see `Load.error`."""

    @abstractmethod
    def close(self) -> None:
        """End the threads after the pieces that they are reading."""

    def read(self, reads: Sequence[Read]) -> None:
        """Read all of `reads`, and return when they are there. Raises as `DirectFile.read`."""
        load = Load(reads, URGENT)
        self.start(load)
        self.wait([load])
        if load.error is not None:
            raise load.error


def open_reads(files: Iterable[DirectFile]) -> Reads:
    """Threads of the extension where it is there and `pread` is all that `files` need, else Python's."""
    native = native_module()
    if native is None or not all(file.plain for file in files):
        return PythonReads()
    return NativeReads(native.Reads(THREADS))


class NativeReads(Reads):
    """Threads of the extension, which take no turns with Python's: a third less time of the processor."""

    def __init__(self, reads: Any) -> None:
        self._reads = reads
        self._loads: dict[int, Load] = {}  # keeps files and memory alive
        self._numbers: dict[int, int] = {}  # by the id of the load

    @property
    def nbytes(self) -> int:
        return int(self._reads.bytes)

    def start(self, load: Load) -> None:
        number = self._reads.start(
            [(p.file.fileno(), p.offset, p.address, len(p.buffer), p.nbytes) for p in load.pieces], load.kind
        )
        self._loads[number], self._numbers[id(load)] = load, number
        load.poll = partial(self._poll, number)

    def hurry(self, load: Load) -> None:
        load.kind = URGENT
        if load.poll is not None:
            self._reads.hurry(self._numbers[id(load)])

    def cancel(self, load: Load) -> int:
        return 0 if load.poll is None else int(self._reads.cancel(self._numbers[id(load)]))

    def wait(self, loads: Sequence[Load]) -> Load:
        while True:
            for load in loads:
                if load.finished:
                    return load
            # Not for ever, so that Ctrl-C is noticed.
            self._reads.wait([self._numbers[id(load)] for load in loads], WAIT_MILLISECONDS)

    def close(self) -> None:
        self._reads.close()

    def _poll(self, number: int) -> None:
        finished, code, index = self._reads.outcome(number)
        if not finished:
            return
        load = self._loads.pop(number)
        del self._numbers[id(load)]
        self._reads.forget(number)
        load.poll, load.unfinished = None, 0
        if code:
            piece = load.pieces[index]
            end = piece.offset + piece.nbytes
            load.error = (
                piece.file.cut_short(end)
                if code < 0
                else piece.file.unreadable(code, piece.offset, piece.nbytes)
            )
            return
        try:
            for file in {id(piece.file): piece.file for piece in load.pieces}.values():
                file.check_unchanged()
        except MoeSurgeryError as error:
            load.error = error


class PythonReads(Reads):
    """The specification of `NativeReads`, with Python's threads and any `FileOps`.

    They are daemons, so that an interrupted process need not wait for a slow disk.
    """

    def __init__(self, threads: int = THREADS) -> None:
        lock = threading.Lock()
        self._added, self._ended = threading.Condition(lock), threading.Condition(lock)
        self._loads: tuple[deque[Load], ...] = (deque(), deque(), deque())
        self._closed = False
        self._nbytes = 0
        for number in range(threads):
            threading.Thread(target=self._work, name=f"read-{number}", daemon=True).start()

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def start(self, load: Load) -> None:
        with self._added:
            self._loads[load.kind].append(load)
            self._added.notify(load.unfinished)

    def hurry(self, load: Load) -> None:
        with self._added:
            if load.kind != URGENT and load.waiting:
                self._loads[load.kind].remove(load)
                self._loads[URGENT].append(load)
            load.kind = URGENT

    def cancel(self, load: Load) -> int:
        with self._added:
            dropped = sum(piece.nbytes for piece in load.waiting)
            if load.waiting:
                self._drop(load)
            return dropped

    def wait(self, loads: Sequence[Load]) -> Load:
        with self._ended:
            while True:
                for load in loads:
                    if load.finished:
                        return load
                self._ended.wait()

    def close(self) -> None:
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
                self._nbytes += piece.nbytes
                load.unfinished -= 1
                if error is not None:
                    load.error = load.error or error
                    if load.waiting:
                        self._drop(load)
                if load.finished:
                    self._ended.notify_all()
