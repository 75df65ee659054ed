"""Writing the header of a GGUF file, version 3, little endian: metadata, tensor table, padding.

Source: docs/gguf.md of ggml-org/ggml. Strings and arrays carry their length as 64 bits; a tensor's
dimensions are listed fastest first; offsets count from the end of the header, which is padded.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from moe_surgery.checkpoint.gguf.block_types import BlockType
from moe_surgery.checkpoint.gguf.header import DEFAULT_ALIGNMENT, MAGIC, ValueType

__all__ = ["ALIGNMENT", "Metadata", "TensorEntry", "header", "padding", "preamble", "tensor_table"]

ALIGNMENT: Final = DEFAULT_ALIGNMENT
VERSION: Final = 3


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A row of the tensor table; `shape` slowest dimension first, `nbytes` without padding."""

    name: str
    type: BlockType
    shape: tuple[int, ...]
    nbytes: int


class Metadata:
    """Key-value pairs, packed as they are added. Raises struct.error for a number out of range."""

    def __init__(self) -> None:
        self.packed = bytearray()
        self.keys: list[str] = []

    def u16(self, key: str, value: int) -> None:
        self._add(key, ValueType.U16, struct.pack("<H", value))

    def u32(self, key: str, value: int) -> None:
        self._add(key, ValueType.U32, struct.pack("<I", value))

    def i32(self, key: str, value: int) -> None:
        self._add(key, ValueType.I32, struct.pack("<i", value))

    def f32(self, key: str, value: float) -> None:
        self._add(key, ValueType.F32, struct.pack("<f", value))

    def flag(self, key: str, value: bool) -> None:
        self._add(key, ValueType.BOOL, struct.pack("<?", value))

    def text(self, key: str, value: str) -> None:
        self._add(key, ValueType.STRING, _string(value.encode()))

    def texts(self, key: str, values: Sequence[bytes]) -> None:
        """An array of strings, each UTF-8."""
        self._add(key, ValueType.ARRAY, struct.pack("<IQ", ValueType.STRING, len(values)))
        for value in values:
            self.packed += _string(value)

    def i32s(self, key: str, values: Sequence[int]) -> None:
        self._numbers(key, ValueType.I32, "i", values)

    def u32s(self, key: str, values: Sequence[int]) -> None:
        self._numbers(key, ValueType.U32, "I", values)

    def _numbers(self, key: str, kind: int, code: str, values: Sequence[int]) -> None:
        head = struct.pack("<IQ", kind, len(values))
        self._add(key, ValueType.ARRAY, head + struct.pack(f"<{len(values)}{code}", *values))

    def _add(self, key: str, kind: int, value: bytes) -> None:
        self.keys.append(key)
        self.packed += _string(key.encode()) + struct.pack("<I", kind) + value


def padding(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """Zeros that follow `nbytes` bytes up to the next aligned position."""
    return -nbytes % alignment


def preamble(tensors: int, entries: int) -> bytes:
    """The first 24 bytes of a file with these numbers of tensors and metadata entries."""
    return MAGIC + struct.pack("<IQQ", VERSION, tensors, entries)


def tensor_table(tensors: Iterable[TensorEntry], alignment: int = ALIGNMENT) -> bytes:
    """The tensor table; data follows in the same order, each tensor padded to `alignment`."""
    table = bytearray()
    offset = 0
    for tensor in tensors:
        name = tensor.name.encode("utf-8", "surrogateescape")
        table += _string(name) + struct.pack("<I", len(tensor.shape))
        table += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        table += struct.pack("<IQ", tensor.type.number, offset)
        offset += tensor.nbytes + padding(tensor.nbytes, alignment)
    return bytes(table)


def header(metadata: Metadata, tensors: Sequence[TensorEntry]) -> bytes:
    """Everything before the tensor data, padding included."""
    raw = preamble(len(tensors), len(metadata.keys)) + metadata.packed + tensor_table(tensors)
    return raw + bytes(padding(len(raw)))


def _string(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value
