"""GGUF files put together byte by byte, so that they may be wrong."""

from __future__ import annotations

import struct
from collections.abc import Sequence

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def kv(key: str | bytes, kind: int, value: bytes) -> bytes:
    """A metadata entry; `value` as it lies in the file."""
    return text(key) + struct.pack("<I", kind) + value


def array(item: int, count: int, items: bytes) -> bytes:
    """The value of an array entry."""
    return struct.pack("<IQ", item, count) + items


def u16(key: str, value: int) -> bytes:
    return kv(key, U16, struct.pack("<H", value))


def u32(key: str, value: int) -> bytes:
    return kv(key, U32, struct.pack("<I", value))


def i32(key: str, value: int) -> bytes:
    return kv(key, I32, struct.pack("<i", value))


def tensor(name: str | bytes, dims: Sequence[int], kind: int, offset: int) -> bytes:
    """A row of the tensor table; `dims` fastest first, as in the file."""
    return (
        text(name)
        + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        + struct.pack("<I", kind)
        + struct.pack("<Q", offset)
    )


def file(
    entries: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    alignment: int = 32,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A whole file; `counts` are the numbers of tensors and entries that the preamble announces."""
    tensor_count, entry_count = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, tensor_count, entry_count)
    head += b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data
