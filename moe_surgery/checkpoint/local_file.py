"""Files and folders of this machine's file systems as sources of bytes."""

from __future__ import annotations

import mmap
import os
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from moe_surgery.checkpoint.direct_file import DirectFile, io_buffer, whole_blocks
from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.files import open_regular, printable_path
from moe_surgery.checkpoint.hub import snapshot_of
from moe_surgery.checkpoint.source import ByteSource, Folder
from moe_surgery.errors import InvalidInputError, OutputError

__all__ = ["FileStamp", "LocalFile", "LocalFolder"]

MADV_POPULATE_READ = 22  # Linux 5.14; Python's mmap has no name for it

LEAST_DIRECT = 128 << 10
DIRECT_BYTES = 1 << 20
"""Bytes of a slice that is read past the page cache, at least, and of one such read, at most."""

HUGE_PAGE = 2 << 20

_own = threading.local()


class FileStamp(NamedTuple):
    """Identifies the file and version that was opened."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> FileStamp:
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


class LocalFile(ByteSource):
    """A regular file, opened read-only."""

    def __init__(self, path: Path, ops: FileOps | None = None) -> None:
        """Raises InvalidInputError for anything but a regular file, OutputError where it cannot be opened."""
        self.where = printable_path(path)
        self._path = path
        self._ops = ops or FileOps()
        self._map: mmap.mmap | None = None
        self._slices: DirectFile | None = None
        self._fd = open_regular(path)
        try:
            self._stamp = FileStamp.of(os.fstat(self._fd))
        except BaseException:
            self.close()
            raise
        self.size = self._stamp.size

    @property
    def stamp(self) -> FileStamp:
        return self._stamp

    @property
    def path(self) -> Path:
        return self._path

    def close(self) -> None:
        if self._map is not None:
            with suppress(BufferError):  # a view is still alive; the last one frees the mapping
                self._map.close()
            self._map = None
        if self._slices is not None:
            self._slices.close()
            self._slices = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read_into(self, offset: int, buffer: memoryview, *, cache: bool = False) -> None:
        direct = self._slices
        if direct is not None and not cache and self._is_on_disk(offset, len(buffer)):
            _read_directly(direct, offset, buffer)
            return
        done, total = 0, len(buffer)
        while done < total:
            try:
                count = self._ops.pread_into(self._fd, buffer[done:], offset + done, cache)
            except OSError as error:
                raise self._unreadable(error, offset, total) from error
            if count == 0:
                raise self._cut_short(offset + total)
            done += count

    def expect_slices(self) -> None:
        self._ops.stop_readahead(self._fd)
        if self._slices is None and sys.platform == "linux":
            with suppress(OutputError):  # too many open files, say; the descriptor that is open does as well
                direct = self.direct()
                self._slices = direct if direct.bypasses_cache else None

    def drop_cache(self, offset: int, nbytes: int) -> None:
        self._ops.drop_cache(self._fd, offset, nbytes)

    def region(self, offset: int, nbytes: int) -> memoryview:
        """As `ByteSource.region`; a file truncated since it was opened is an error here, not a SIGBUS later."""
        try:
            if self._map is None:
                self._map = mmap.mmap(self._fd, 0, prot=mmap.PROT_READ)
            size = os.fstat(self._fd).st_size
        except OSError as error:
            raise self._unreadable(error, offset, nbytes) from error
        if offset + nbytes > size:
            raise self._cut_short(offset + nbytes)
        if nbytes and sys.platform == "linux":
            self._advise(MADV_POPULATE_READ, offset, nbytes)
        return memoryview(self._map)[offset : offset + nbytes]

    def release(self, offset: int, nbytes: int) -> None:
        """Free the resident pages of a region (they stay in the page cache)."""
        if self._map is not None and nbytes and sys.platform == "linux":
            self._advise(mmap.MADV_DONTNEED, offset, nbytes)

    def map(self) -> mmap.mmap:
        return mmap.mmap(self._fd, 0, prot=mmap.PROT_READ)

    def direct(self) -> DirectFile:
        return DirectFile(self._path, tuple(self._stamp), self._ops)

    def fileno(self) -> int:
        return self._fd

    def check_unchanged(self) -> None:
        try:
            now = {FileStamp.of(os.stat(self._path)), FileStamp.of(os.fstat(self._fd))}
        except OSError as error:
            raise OutputError(f"{self.where}: {error.strerror}") from error
        if now != {self._stamp}:
            raise InvalidInputError(
                f"{self.where}: changed while it was being read; run again when nothing writes to it"
            )

    def _is_on_disk(self, offset: int, nbytes: int) -> bool:
        """Whether most of a range that is large enough for a direct read is not in the page cache."""
        return nbytes >= LEAST_DIRECT and 2 * self._ops.cached_bytes(self._fd, offset, nbytes) < nbytes

    def _advise(self, advice: int, offset: int, nbytes: int) -> None:
        assert self._map is not None
        start = offset - offset % mmap.PAGESIZE
        try:
            self._map.madvise(advice, start, offset + nbytes - start)
        except OSError as error:
            if error.errno != 22:  # EINVAL: an older kernel without this advice
                raise self._unreadable(error, offset, nbytes) from error

    def _unreadable(self, error: OSError, offset: int, nbytes: int) -> OutputError:
        return OutputError(f"{self.where}: cannot read {nbytes} bytes at {offset}: {error.strerror}")

    def _cut_short(self, end: int) -> InvalidInputError:
        return InvalidInputError(f"{self.where}: ends before byte {end}; it was truncated while being read")


def _read_directly(file: DirectFile, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` from `offset` past the page cache.

    Slices begin anywhere, direct reads at whole blocks, so that they go through memory of the thread's own. Copying
    from there takes a tenth of the time that the system takes to copy through the page cache.
    """
    blocks = getattr(_own, "blocks", None)
    if blocks is None:
        blocks = _own.blocks = memoryview(io_buffer(HUGE_PAGE))
    for begin in range(0, len(buffer), DIRECT_BYTES):
        part = buffer[begin : begin + DIRECT_BYTES]
        start, nbytes = whole_blocks(offset + begin, len(part))
        skipped = offset + begin - start
        needed = skipped + len(part)
        file.read(start, blocks[:nbytes], needed)
        part[:] = blocks[skipped:needed]


class LocalFolder(Folder):
    """A folder of this machine."""

    def __init__(self, path: Path, ops: FileOps | None = None) -> None:
        self.path = path
        self._ops = ops or FileOps()

    @property
    def on_disk(self) -> Path:
        return self.path

    @property
    def hub_model(self) -> tuple[str, str] | None:
        hub_id, revision = snapshot_of(self.path)
        return (hub_id, revision) if hub_id else None

    def listing(self) -> Mapping[str, bool]:
        try:
            with os.scandir(self.path) as entries:
                return {entry.name: _is_file(entry) for entry in entries}
        except OSError as error:
            raise OutputError(f"{printable_path(self.path)}: cannot list: {error.strerror}") from None

    def open(self, name: str) -> ByteSource:
        return LocalFile(self.path / name, self._ops)

    def is_file(self, name: str) -> bool:
        return os.path.isfile(self.path / name)

    def folder(self, name: str) -> Folder | None:
        path = self.path.resolve().parent if name == os.pardir else self.path / name
        return LocalFolder(path, self._ops) if path.is_dir() else None


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # link cycle, no permission: `open` reports it
        return False
