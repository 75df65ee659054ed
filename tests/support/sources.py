"""A source of bytes in memory: no descriptor, no mapping, as a server behind range requests has none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from pathlib import Path

import xxhash

from moe_surgery.checkpoint.local_file import LocalFolder
from moe_surgery.checkpoint.source import ByteSource, Folder
from moe_surgery.errors import InvalidInputError, OutputError


class MemoryFile:
    """The content of sources in memory, which may change while they are open."""

    def __init__(self, content: bytes) -> None:
        self.content = content


class MemorySource(ByteSource):
    """One opening of a `MemoryFile`; its stamp is a digest, as a server's ETag may be."""

    def __init__(self, where: str, file: MemoryFile) -> None:
        self.where = where
        self.size = len(file.content)
        self._file: MemoryFile | None = file
        self._stamp = xxhash.xxh3_128_hexdigest(file.content)

    @property
    def stamp(self) -> Hashable:
        return self._stamp

    def read_into(self, offset: int, buffer: memoryview, *, cache: bool = False) -> None:
        content = self._opened().content
        if offset + len(buffer) > len(content):
            end = offset + len(buffer)
            raise InvalidInputError(
                f"{self.where}: ends before byte {end}; it was truncated while being read"
            )
        buffer[:] = content[offset : offset + len(buffer)]

    def check_unchanged(self) -> None:
        if xxhash.xxh3_128_hexdigest(self._opened().content) != self._stamp:
            raise InvalidInputError(f"{self.where}: changed while it was being read")

    def close(self) -> None:
        self._file = None

    def _opened(self) -> MemoryFile:
        if self._file is None:
            raise OutputError(f"{self.where}: is closed")
        return self._file


class MemoryFolder(Folder):
    """The files of `folder`, held in memory; `opened` counts openings by name."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.opened: Counter[str] = Counter()
        self._folders = {f.name: MemoryFolder(f) for f in folder.iterdir() if f.is_dir()}
        self._listing = dict(LocalFolder(folder).listing())
        self._above: MemoryFolder | None = None
        for inside in self._folders.values():
            inside._above = self
        self._files = {f.name: MemoryFile(f.read_bytes()) for f in folder.iterdir() if f.is_file()}

    def listing(self) -> Mapping[str, bool]:
        return self._listing

    def folder(self, name: str) -> MemoryFolder | None:
        return self._above if name == ".." else self._folders.get(name)

    def open(self, name: str) -> ByteSource:
        if name.startswith("../") and self._above is not None:
            return self._above.open(name.removeprefix("../"))
        self.opened[name] += 1
        return MemorySource(f"memory:{name}", self._files[name])
