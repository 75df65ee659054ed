"""A local file read past the page cache, in whole blocks."""

from __future__ import annotations

import errno
import mmap
import os
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Final

from moe_surgery.checkpoint.fileops import UNSUPPORTED, FileOps
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.errors import InvalidInputError, OutputError

__all__ = ["BLOCK", "DirectFile", "io_buffer", "whole_blocks"]

BLOCK: Final = 4096
"""Direct reads take multiples of this many bytes, from multiples of it, into memory at multiples of it."""


def whole_blocks(offset: int, nbytes: int) -> tuple[int, int]:
    """The smallest range (offset, bytes) of whole blocks that holds [offset, offset + nbytes)."""
    start = offset - offset % BLOCK
    return start, -(-(offset + nbytes - start) // BLOCK) * BLOCK


def io_buffer(nbytes: int) -> mmap.mmap:
    """Memory for direct reads and writes, in huge pages where Linux has them and `nbytes` is a multiple of 2 MiB.

    1 or 2 MiB are then one request to the disk; in pages of 4 KiB they are several.
    """
    buffer = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


class DirectFile:
    """A descriptor of its own for a file whose bytes are read again and again into the caller's own memory.

    Reads bypass the page cache where the system can (O_DIRECT on Linux, F_NOCACHE on macOS); elsewhere the pages
    that they bring in are dropped again. Any number of threads may read. The descriptor is closed when nothing
    refers to this any more.
    """

    def __init__(self, path: Path, version: object, ops: FileOps) -> None:
        """`version`: `version_of` the file when it was first opened. Raises OutputError, or InvalidInputError if it
        has changed since."""
        self.where = printable_path(path)
        self._ops, self._version = ops, version
        try:
            self._fd, self._direct = ops.open_direct(path)
        except OSError as error:
            raise OutputError(f"{self.where}: cannot open: {error.strerror}") from None
        self.close = weakref.finalize(self, os.close, self._fd)
        try:
            self.check_unchanged()
            if self._direct:
                self._try_direct()
        except BaseException:
            self.close()
            raise

    @property
    def bypasses_cache(self) -> bool:
        """Whether reads bypass the page cache."""
        return self._direct

    @property
    def plain(self) -> bool:
        """Whether `pread` with `fileno()` does the same as `read`, past the page cache."""
        return self._direct and type(self._ops) is FileOps

    def fileno(self) -> int:
        return self._fd

    def read(self, offset: int, buffer: memoryview, needed: int) -> None:
        """Fill `buffer`, whole blocks at a block's address, from `offset`, a block's; at least the first `needed`
        bytes, where the file ends before the last block.

        Raises InvalidInputError if the file is too short or has changed since it was opened, OutputError if it
        cannot be read.
        """
        done = 0
        while done < needed:
            start = done - done % BLOCK if self._direct else done  # a short read may end within a block
            try:  # bypassing the cache is the descriptor's doing, not of a flag of the read
                count = self._ops.pread_into(self._fd, buffer[start:], offset + start, cache=self._direct)
            except OSError as error:
                raise self.unreadable(error.errno, offset, needed) from error
            if start + count <= done:
                raise self.cut_short(offset + needed)
            done = start + count
        self.check_unchanged()

    def unreadable(self, code: int | None, offset: int, nbytes: int) -> OutputError:
        """The error of a read that failed with errno `code`."""
        reason = os.strerror(code or errno.EIO)
        return OutputError(f"{self.where}: cannot read {nbytes} bytes at {offset}: {reason}")

    def cut_short(self, end: int) -> InvalidInputError:
        """The error of a file that ends before `end`."""
        return InvalidInputError(f"{self.where}: ends before byte {end}; it was truncated while being read")

    def _try_direct(self) -> None:
        """Read a block, and give up direct reads where the file system opens files for them but has none."""
        with mmap.mmap(-1, BLOCK) as block, memoryview(block) as buffer:
            try:
                self._ops.pread_into(self._fd, buffer, 0, cache=True)
            except OSError as error:
                if error.errno in UNSUPPORTED and self._ops.set_direct(self._fd, False):
                    self._direct = False

    def check_unchanged(self) -> None:
        """Raise InvalidInputError if the bytes behind the descriptor were written to since the file was opened.

        A file that takes its name does not matter: the descriptor keeps the old one.
        """
        try:
            now = version_of(os.fstat(self._fd))
        except OSError as error:
            raise OutputError(f"{self.where}: {error.strerror or os.strerror(errno.EIO)}") from error
        if now != self._version:
            raise InvalidInputError(
                f"{self.where}: changed while it was open; run again when nothing writes to it"
            )


def version_of(stat: os.stat_result) -> tuple[int, int, int, int]:
    """Identifies a file and its version."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
