"""Sources of bytes, read by position.

The files of a checkpoint are read through these two interfaces, so that a file on disk, an HTTP range
request or a buffer in memory can implement them. Optional operations (map, reflink) return None where a
source does not support them; it is then read.
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

from moe_surgery.checkpoint.direct_file import DirectFile
from moe_surgery.errors import InvalidInputError

__all__ = ["ByteSource", "Folder", "read_optional", "read_small"]


class ByteSource(ABC):
    """One file, open for reading by any number of threads. Close it, or use it as a context manager."""

    where: str
    """Its path or address in messages, safe to print."""

    size: int
    """Bytes, when it was opened."""

    concurrent_reads: int | None = None
    """Reads in flight at which it is fastest, where that is more than for a local file."""

    @property
    @abstractmethod
    def stamp(self) -> Hashable:
        """Differs between two openings if the content changed, as far as the source can tell; so does its `repr`."""

    @abstractmethod
    def read_into(self, offset: int, buffer: memoryview, *, cache: bool = False) -> None:
        """Fill `buffer` with the bytes from `offset`; `cache` if they are soon read again (then `drop_cache`).

        Raises InvalidInputError if the file is too short, OutputError if it cannot be read.
        """

    def read_many(self, wanted: Sequence[tuple[int, memoryview]]) -> None:
        """Fill each buffer with the bytes from its offset. A remote source reads those close together at once.

        Raises as `read_into`.
        """
        for offset, buffer in wanted:
            self.read_into(offset, buffer)

    def expect_slices(self) -> None:  # noqa: B027
        """Announce that reads without `cache` now ask for slices that are wanted once, and for all that is wanted.

        Nothing is read beyond them, and where the system can, past the page cache. Raises as `check_unchanged`.
        """

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:  # noqa: B027
        """Announce ranges (offset, bytes) that one `read_many` will soon read, so that they can be requested ahead."""

    def cancel(self) -> None:  # noqa: B027
        """End reads that wait, in other threads, with an error."""

    @abstractmethod
    def check_unchanged(self) -> None:
        """Raise InvalidInputError if the file was replaced or written to since it was opened, OutputError if gone."""

    @abstractmethod
    def close(self) -> None:
        """Release the file; later reads raise OutputError. Closing twice is allowed."""

    def read(self, offset: int, nbytes: int) -> bytes:
        """The `nbytes` bytes at `offset`; raises as `read_into`."""
        buffer = bytearray(nbytes)
        self.read_into(offset, memoryview(buffer), cache=True)
        return bytes(buffer)

    def drop_cache(self, offset: int, nbytes: int) -> None:  # noqa: B027
        """Drop what was cached by reads with `cache`."""

    def region(self, offset: int, nbytes: int) -> memoryview | None:
        """The mapped bytes [offset, offset + nbytes), already read in; None where the source has no mapping.

        Raises as `read_into`. Free the pages with `release`.
        """
        return None

    def release(self, offset: int, nbytes: int) -> None:  # noqa: B027
        """Free the resident pages of a region."""

    def map(self) -> mmap.mmap | None:
        """A read-only mapping of the whole file, which outlives the source; None where there is none."""
        return None

    def direct(self) -> DirectFile | None:
        """The same file for reads past the page cache, which outlives the source; None where there is none.

        Raises as `read_into`.
        """
        return None

    def fileno(self) -> int | None:
        """A descriptor for reflinks on the same file system; None where there is none."""
        return None

    @property
    def path(self) -> Path | None:
        """The local path, None where there is none."""
        return None

    def __enter__(self) -> ByteSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Folder(ABC):
    """The files of a checkpoint."""

    path: Path
    """The folder, as shown in messages; it need not exist on this machine."""

    concurrent_opens: int = 1
    """Files that are opened at a time when many are."""

    def __str__(self) -> str:
        return str(self.path)

    @abstractmethod
    def listing(self) -> Mapping[str, bool]:
        """Every name in the folder, and whether it is a regular file (or a link to one). Raises OutputError."""

    @abstractmethod
    def open(self, name: str) -> ByteSource:
        """Open the file `name`.

        Raises InvalidInputError for anything but a file, OutputError where it cannot be opened.
        """

    def is_file(self, name: str) -> bool:
        """Whether there is a regular file `name` (or a link to one)."""
        return self.listing().get(name, False)

    def nbytes(self, name: str) -> int:
        """Bytes of the file `name`; raises as `open`."""
        with self.open(name) as source:
            return source.size

    def bytes_to_fetch(self, name: str) -> int:
        """Bytes that reading the whole file `name` takes from a network: its size, or 0 where it is on this machine."""
        return 0

    def folder(self, name: str) -> Folder | None:
        """The folder `name` inside this one, or the one above for ".."; None where there is none."""
        return None

    @property
    def on_disk(self) -> Path | None:
        """The folder on this machine, None where it is elsewhere."""
        return None

    @property
    def hub_model(self) -> tuple[str, str] | None:
        """The id on the hub and the commit of the model whose files these are, where that is known."""
        return None

    def close(self) -> None:  # noqa: B027
        """Release what is kept for the next file, such as open connections; the folder can still be used."""


def read_small(source: ByteSource, *, limit: int, what: str) -> bytes:
    """All bytes of a file that may hold at most `limit`; `what` names its role in errors.

    Raises InvalidInputError for more than `limit` bytes, before reading them, and as `read_into`.
    """
    if source.size > limit:
        raise InvalidInputError(f"{source.where}: larger than the {limit} bytes allowed for {what}")
    return source.read(0, source.size)


def read_optional(folder: Folder, name: str, *, limit: int, what: str) -> bytes | None:
    """All bytes of the file `name` of `folder`, None where there is none; raises as `read_small`."""
    if not folder.is_file(name):
        return None
    with folder.open(name) as source:
        return read_small(source, limit=limit, what=what)
