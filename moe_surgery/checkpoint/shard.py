"""A file of weights, open for reading: its header, and its bytes from any source."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import TypeVar

from moe_surgery.checkpoint.header import Header, TensorInfo, read_header
from moe_surgery.checkpoint.source import ByteSource

__all__ = ["OpenFile", "Shard"]

Opened = TypeVar("Opened", bound="OpenFile")


class OpenFile:
    """A file of weights, open for reading over `source`, which it closes. Close it, or use it as a context manager."""

    def __init__(self, name: str, source: ByteSource) -> None:
        self.name = name
        self.source = source

    @property
    def where(self) -> str:
        """Its name in messages."""
        return self.source.where

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self.source.size

    @property
    def stamp(self) -> Hashable:
        return self.source.stamp

    def close(self) -> None:
        self.source.close()

    def __enter__(self: Opened) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_into(self, offset: int, buffer: memoryview, *, cache: bool = False) -> None:
        """Fill `buffer` from file position `offset`; see `ByteSource.read_into`."""
        self.source.read_into(offset, buffer, cache=cache)

    def read_many(self, wanted: Sequence[tuple[int, memoryview]]) -> None:
        """Fill several buffers; see `ByteSource.read_many`."""
        self.source.read_many(wanted)

    def drop_cache(self, offset: int, nbytes: int) -> None:
        """Drop what was cached by reads with `cache`."""
        self.source.drop_cache(offset, nbytes)

    def region(self, offset: int, nbytes: int) -> memoryview:
        """The bytes [offset, offset + nbytes): mapped where the source supports it, else read into new memory.

        Raises as `read_into`. Free mapped pages with `release`.
        """
        mapped = self.source.region(offset, nbytes)
        if mapped is not None:
            return mapped
        buffer = memoryview(bytearray(nbytes))
        self.read_into(offset, buffer)
        return buffer

    def release(self, offset: int, nbytes: int) -> None:
        """Free the resident pages of a mapped region."""
        self.source.release(offset, nbytes)

    def check_unchanged(self) -> None:
        """Raise InvalidInputError if the file was replaced or written to since it was opened."""
        self.source.check_unchanged()


class Shard(OpenFile):
    """A safetensors file."""

    def __init__(self, name: str, source: ByteSource) -> None:
        """Read and validate the header. Raises InvalidInputError (malformed) or OutputError (cannot be read)."""
        super().__init__(name, source)
        try:
            self.header: Header = read_header(source)
        except BaseException:
            source.close()
            raise

    def take_tensors(self) -> list[TensorInfo]:
        """The header's tensors, removed from it to save memory."""
        tensors = list(self.header.tensors.values())
        self.header = replace(self.header, tensors={})
        return tensors
