"""One safetensors file, open for reading: header, identity, positional reads, mapped windows."""

from __future__ import annotations

import mmap
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.files import open_regular, printable_path
from moe_surgery.checkpoint.header import Header, read_header
from moe_surgery.errors import InvalidInputError, OutputError

__all__ = ["Identity", "Shard"]

MADV_POPULATE_READ = 22  # Linux 5.14; Python's mmap has no name for it


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells that a file is still the one that was opened."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> Identity:
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


class Shard:
    """A safetensors file opened read-only. Close it, or use it as a context manager."""

    def __init__(self, path: Path, ops: FileOps) -> None:
        """Open and validate. Raises InvalidInputError (malformed) or OutputError (cannot be read)."""
        self.path = path
        self.name = path.name
        self._ops = ops
        self._map: mmap.mmap | None = None
        self.fd = open_regular(path)
        try:
            self.identity = Identity.of(os.fstat(self.fd))
            self.header: Header = read_header(self.fd, file=printable_path(path))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._map is not None:
            with suppress(BufferError):  # a view is still alive; the map goes with the last one
                self._map.close()
            self._map = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_into(self, buffer: memoryview, offset: int, *, cache: bool = False) -> None:
        """Fill `buffer` from file position `offset`; `cache` if it is read again soon (then `drop_cache`).

        Raises InvalidInputError if the file is shorter than its header said, OutputError if the
        system cannot read it.
        """
        done, total = 0, len(buffer)
        while done < total:
            try:
                count = self._ops.pread_into(self.fd, buffer[done:], offset + done, cache)
            except OSError as error:
                raise OutputError(
                    f"{printable_path(self.path)}: cannot read {total} bytes at {offset}: {error.strerror}"
                ) from error
            if count == 0:
                raise self._cut_short(offset + total)
            done += count

    def drop_cache(self, offset: int, nbytes: int) -> None:
        """Let go of what was read with `cache`."""
        self._ops.drop_cache(self.fd, offset, nbytes)

    def window(self, offset: int, nbytes: int) -> memoryview:
        """The mapped bytes [offset, offset + nbytes), read in before they are returned.

        Where the kernel can, a file cut short since it was opened is an error here instead of a
        SIGBUS at the first touch. Give the pages back with `release`.
        """
        if self._map is None:
            self._map = mmap.mmap(self.fd, 0, prot=mmap.PROT_READ)
        if offset + nbytes > os.fstat(self.fd).st_size:
            raise self._cut_short(offset + nbytes)
        if nbytes and sys.platform == "linux":
            self._advise(MADV_POPULATE_READ, offset, nbytes)
        return memoryview(self._map)[offset : offset + nbytes]

    def release(self, offset: int, nbytes: int) -> None:
        """Let go of the resident pages of a window (they stay in the page cache)."""
        if self._map is not None and nbytes and sys.platform == "linux":
            self._advise(mmap.MADV_DONTNEED, offset, nbytes)

    def _advise(self, advice: int, offset: int, nbytes: int) -> None:
        assert self._map is not None
        start = offset - offset % mmap.PAGESIZE
        try:
            self._map.madvise(advice, start, offset + nbytes - start)
        except OSError as error:
            if error.errno != 22:  # EINVAL: an older kernel does not know the advice
                raise OutputError(
                    f"{printable_path(self.path)}: cannot read {nbytes} bytes at {offset}: {error.strerror}"
                ) from error

    def check_unchanged(self) -> None:
        """Raise InvalidInputError if the file was replaced or written to since it was opened."""
        try:
            now = {Identity.of(os.stat(self.path)), Identity.of(os.fstat(self.fd))}
        except OSError as error:
            raise OutputError(f"{printable_path(self.path)}: {error.strerror}") from error
        if now != {self.identity}:
            raise InvalidInputError(
                f"{printable_path(self.path)}: changed while it was being read; run again when nothing writes to it"
            )

    def _cut_short(self, end: int) -> InvalidInputError:
        return InvalidInputError(
            f"{printable_path(self.path)}: ends before byte {end} that its header promises; "
            "it was cut while being read"
        )
