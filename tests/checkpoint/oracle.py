"""Safetensors files as byte literals, and the safetensors library as the reference for our parser."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any

import safetensors

from moe_surgery.checkpoint.header import Header, parse_header

FILE = "model.safetensors"
ACCEPT = "accept"

# What the library says, by the name of its error variant.
TOO_SMALL = "header too small"
TOO_LARGE = "header too large"
BAD_LENGTH = "invalid header length"
BAD_UTF8 = "invalid UTF-8 in header"
BAD_JSON = "invalid JSON in header"
BAD_OFFSET = "deserializing: invalid offset for tensor"
BAD_INFO = "invalid shape, data type, or offset for tensor"
OVERFLOW = "overflow computing buffer size"
MISALIGNED = "does not end up at a byte boundary"
NOT_COVERED = "file not fully covered"

Tensors = dict[str, tuple[str, list[int], bytes]]


@dataclass(frozen=True)
class Case:
    """One file. `ours` is ACCEPT or a pattern of our message, `reference` ACCEPT or the library's words."""

    id: str
    blob: bytes
    ours: str
    reference: str


def st(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file: little-endian header length (or the false one given), header, data."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> str:
    """The JSON of one tensor entry."""
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})


def obj(*members: tuple[str, str]) -> bytes:
    """A JSON object of (key as written between quotes, value as JSON): keys may repeat."""
    return ("{" + ",".join(f'"{key}":{value}' for key, value in members) + "}").encode()


def split(blob: bytes) -> bytes:
    """What `parse_header` takes: everything before the data section, as far as the file goes."""
    length = int.from_bytes(blob[:8], "little")
    return blob[: 8 + length]


def ours(blob: bytes) -> Header:
    """Our header of a whole file in memory."""
    return parse_header(split(blob), len(blob), file=FILE)


def ours_tensors(blob: bytes) -> Tensors:
    """Name to (dtype, shape, bytes) as we read them."""
    header = ours(blob)
    start = header.data_start
    return {
        info.name: (info.dtype, list(info.shape), blob[start + info.begin : start + info.end])
        for info in header.tensors.values()
    }


def reference_tensors(blob: bytes) -> Tensors:
    """Name to (dtype, shape, bytes) as the library reads them; SafetensorError if it refuses."""
    views: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(blob)  # type: ignore[no-untyped-call]
    return {name: (view["dtype"], list(view["shape"]), bytes(view["data"])) for name, view in views}


def reference_verdict(blob: bytes) -> str:
    """ACCEPT, or the library's error message."""
    try:
        reference_tensors(blob)
    except safetensors.SafetensorError as error:
        return str(error)
    return ACCEPT
