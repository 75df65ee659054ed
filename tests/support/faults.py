"""A table of system calls that fails where it is told to."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_surgery.checkpoint.direct_file import BLOCK
from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.errors import DiskFullError, MoeSurgeryError, OutputError

KINDS = (
    "open",
    "pread_into",
    "pwrite",
    "fsync",
    "fsync_dir",
    "rename",
    "rename_new",
    "exchange",
    "mkdir",
    "close",
    "unlink",
)


class SmallDisk(FileOps):
    """A file system with `free` bytes left."""

    def __init__(self, free: int) -> None:
        self._free = free

    def free_bytes(self, path: str | os.PathLike[str]) -> int:
        return self._free


class FaultyOps(FileOps):
    """Fails the call number `at` (from 1) of `kind` with `code`; with `forever` all later ones too.

    Nothing is done by a call that fails, but for close: its descriptor is gone either way.
    """

    def __init__(self, kind: str = "", at: int = 0, code: int = 0, *, forever: bool = False) -> None:
        self.calls: Counter[str] = Counter()
        self.failures = 0
        self._kind, self._at, self._code, self._forever = kind, at, code, forever
        self._lock = threading.Lock()

    def enter(self, kind: str) -> bool:
        """Count a call; whether it has to fail."""
        with self._lock:
            self.calls[kind] += 1
            number = self.calls[kind]
            fails = kind == self._kind and (number == self._at or (self._forever and number > self._at))
            self.failures += fails
        return fails

    def error(self) -> OSError:
        return OSError(self._code, os.strerror(self._code))


def _faulty(kind: str) -> Callable[..., Any]:
    original = getattr(FileOps, kind)

    def call(self: FaultyOps, *arguments: Any, **named: Any) -> Any:
        if not self.enter(kind):
            return original(self, *arguments, **named)
        if kind == "close":
            original(self, *arguments, **named)
        raise self.error()

    return call


for _kind in KINDS:
    setattr(FaultyOps, _kind, _faulty(_kind))


def each_failure(kind: str, forever: bool) -> Iterator[tuple[FaultyOps, type[MoeSurgeryError]]]:
    """Tables in which one call of `kind` after the other fails, and the error each must end with.

    The first eight calls each have their turn, later ones ever fewer. The last table fails nothing: the run makes
    no more such calls.
    """
    at, ops = 0, None
    while ops is None or ops.failures:
        at += 1 + at // 8
        assert at < 1000
        code = (errno.EIO, errno.ENOSPC, errno.EDQUOT)[at % 3]
        ops = FaultyOps(kind, at, code, forever=forever)
        no_space = code != errno.EIO and kind != "pread_into"
        yield ops, DiskFullError if no_space else OutputError
    assert at > 1, "the run makes no such call"


class ShortOps(FileOps):
    """Reads and writes at most what `some` makes of the bytes asked for, as the system may."""

    def __init__(self, some: Callable[[int], int]) -> None:
        self._some = some

    def pread_into(self, fd: int, buffer: memoryview, offset: int, cache: bool = False) -> int:
        count = self._some(len(buffer))
        direct = getattr(os, "O_DIRECT", 0)
        if fd >= 0 and fcntl.fcntl(fd, fcntl.F_GETFL) & direct:  # those are short by whole blocks
            count = -(-count // BLOCK) * BLOCK
        return super().pread_into(fd, buffer[:count], offset, cache)

    def pwrite(self, fd: int, data: memoryview | bytes, offset: int) -> int:
        return super().pwrite(fd, data[: self._some(len(data))], offset)


def open_files(*folders: Path) -> list[str]:
    """Paths of this process's open descriptors that are one of `folders` or lie in one, sorted.

    Other descriptors are not counted: the garbage collector may close one of an earlier test at any time.
    """
    inside = tuple(os.path.realpath(folder) for folder in folders)
    paths = (_descriptor_path(int(fd)) for fd in os.listdir("/dev/fd"))
    return sorted(p for p in paths if any(p == f or p.startswith(f + os.sep) for f in inside))


def _descriptor_path(fd: int) -> str:
    """The path that `fd` was opened at; empty if it has none, or is closed by now."""
    with suppress(OSError):
        if sys.platform == "darwin":
            return fcntl.fcntl(fd, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0").decode()
        return os.readlink(f"/proc/self/fd/{fd}")
    return ""
