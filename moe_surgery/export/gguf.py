"""The GGUF container, version 3, little endian: metadata, tensor table, aligned data.

Source: docs/gguf.md of ggml-org/ggml. Strings and arrays carry their length as 64 bits; a tensor's
dimensions are listed fastest first; offsets count from the end of the header, which is padded.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

__all__ = ["ALIGNMENT", "Metadata", "TensorEntry", "TensorType", "header", "padding"]

ALIGNMENT: Final = 32
_MAGIC: Final = b"GGUF"
_VERSION: Final = 3
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


class TensorType(IntEnum):
    """ggml's type numbers."""

    F32 = 0
    F16 = 1
    BF16 = 30
    MXFP4 = 39


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A row of the tensor table; `shape` slowest dimension first, `nbytes` without padding."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    nbytes: int


class Metadata:
    """Key-value pairs, packed as they are added. Raises struct.error for a number out of range."""

    def __init__(self) -> None:
        self.packed = bytearray()
        self.keys: list[str] = []

    def u32(self, key: str, value: int) -> None:
        self._add(key, _U32, struct.pack("<I", value))

    def f32(self, key: str, value: float) -> None:
        self._add(key, _F32, struct.pack("<f", value))

    def flag(self, key: str, value: bool) -> None:
        self._add(key, _BOOL, struct.pack("<?", value))

    def text(self, key: str, value: str) -> None:
        self._add(key, _STRING, _string(value.encode()))

    def texts(self, key: str, values: Sequence[bytes]) -> None:
        """An array of strings, each UTF-8."""
        self._add(key, _ARRAY, struct.pack("<IQ", _STRING, len(values)))
        for value in values:
            self.packed += _string(value)

    def i32s(self, key: str, values: Sequence[int]) -> None:
        self._add(key, _ARRAY, struct.pack(f"<IQ{len(values)}i", _I32, len(values), *values))

    def _add(self, key: str, kind: int, value: bytes) -> None:
        self.keys.append(key)
        self.packed += _string(key.encode()) + struct.pack("<I", kind) + value


def padding(nbytes: int) -> int:
    """Zeros that follow `nbytes` bytes up to the next aligned position."""
    return -nbytes % ALIGNMENT


def header(metadata: Metadata, tensors: Iterable[TensorEntry]) -> bytes:
    """Everything before the tensor data, padding included."""
    table = bytearray()
    offset = count = 0
    for tensor in tensors:
        table += _string(tensor.name.encode()) + struct.pack("<I", len(tensor.shape))
        table += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        table += struct.pack("<IQ", tensor.type, offset)
        offset += tensor.nbytes + padding(tensor.nbytes)
        count += 1
    raw = _MAGIC + struct.pack("<IQQ", _VERSION, count, len(metadata.keys)) + metadata.packed + table
    return raw + bytes(padding(len(raw)))


def _string(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value
