"""The header of one GGUF file: metadata as raw bytes, and the tensor table, validated as llama.cpp does.

Source: docs/gguf.md of ggml-org/ggml, and gguf.cpp of ggml-org/llama.cpp for what its reader refuses.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from typing import Final

from moe_surgery.checkpoint.gguf.block_types import BLOCK_TYPES, REFUSED_TYPES, BlockType
from moe_surgery.checkpoint.source import ByteSource
from moe_surgery.checkpoint.text import printable
from moe_surgery.errors import InvalidInputError

__all__ = ["GgufHeader", "GgufTensorInfo", "KeyValue", "ValueType", "read_gguf_header", "read_value"]

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32
ALIGNMENT_KEY: Final = "general.alignment"
LEAST_ALIGNMENT: Final = 16
"""llama.cpp maps tensors where they lie, and aborts where the first is not at a multiple of 32 of the file."""
MAX_NAME_BYTES: Final = 63
MAX_DIMENSIONS: Final = 4
MAX_ELEMENTS: Final = 1 << 62
"""From here on llama.cpp refuses some shapes and aborts on others, even where one of the dimensions is 0."""
MAX_ITEMS: Final = 1 << 30
"""Of a string or an array."""
MAX_KEY_BYTES: Final = (1 << 16) - 1
"""By docs/gguf.md; llama.cpp does not check it."""
MAX_ENTRIES, MAX_TENSORS = 1 << 16, 1 << 18
"""Ours: they bound the memory that a header takes."""
_LOOKALIKES: Final = (
    (b"version https://git-lfs", "a Git LFS pointer: fetch the file itself with `git lfs pull`"),
    (b"<!doctype html", "an HTML page: the download failed or needs a login"),
    (b"<html", "an HTML page: the download failed or needs a login"),
    (b"tjgg", "a GGML file of 2023, which llama.cpp no longer reads: convert the model again"),
)
_FIRST_WINDOW, _LARGEST_WINDOW = 256 << 10, 2 << 20
_SHORT: Final = 512
"""Bytes of a value that are kept with its place."""
_LEAST_KEY_VALUE: Final = 8 + 1 + 4 + 1
_LEAST_TENSOR: Final = 8 + 4 + 4 + 8


class ValueType:
    """The numbers of metadata types."""

    U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
    NAMES: Final = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "arr", "u64", "i64", "f64")
    """llama.cpp's, for messages."""


_FORMATS: Final = {
    ValueType.U8: "B",
    ValueType.I8: "b",
    ValueType.U16: "H",
    ValueType.I16: "h",
    ValueType.U32: "I",
    ValueType.I32: "i",
    ValueType.F32: "f",
    ValueType.BOOL: "?",
    ValueType.U64: "Q",
    ValueType.I64: "q",
    ValueType.F64: "d",
}
_SIZES: Final = {kind: struct.calcsize(f"<{code}") for kind, code in _FORMATS.items()}


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One entry of the metadata: `nbytes` bytes at file position `offset`, of which the value begins at `value`.

    `type` is a `ValueType`; `item_type` and `count` are those of an array (-1 and 1 for others). The value
    begins after the type, that of an array after its item type and length. `raw` are the bytes of a short value,
    where they were at hand when the header was read.
    """

    key: str
    type: int
    offset: int
    value: int
    nbytes: int
    item_type: int = -1
    count: int = 1
    raw: bytes | None = field(default=None, compare=False, repr=False)

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class GgufTensorInfo:
    """A row of the tensor table: `nbytes` bytes (without padding) at file position `offset`.

    `shape` has the slowest dimension first, so that of [.., E] in ggml's order is (E, ..).
    """

    name: str
    type: BlockType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """`metadata` and `tensors` in the order of the file; tensor data begins at `data_start`."""

    version: int
    alignment: int
    metadata: dict[str, KeyValue]
    tensors: dict[str, GgufTensorInfo]
    data_start: int


def read_gguf_header(source: ByteSource) -> GgufHeader:
    """Read and validate the header of `source`.

    Raises InvalidInputError for whatever llama.cpp's reader refuses, naming key or tensor; OutputError where
    the file cannot be read.
    """
    return _Reader(source).header()


def read_value(source: ByteSource, entry: KeyValue) -> object:
    """The value of `entry`: a number, a bool, a str, or a list of them.

    Bytes of strings that are not UTF-8 become lone surrogates. Raises as `read_gguf_header`.
    """
    reader = _Reader(source, entry.value, f"key '{printable(entry.key)}'")
    reader.hold(source.read(entry.value, entry.end - entry.value) if entry.raw is None else entry.raw)
    if entry.type != ValueType.ARRAY:
        return reader.value(entry.type)
    if entry.item_type in _FORMATS:
        raw = reader.take(entry.count * _SIZES[entry.item_type])
        return list(struct.unpack(f"<{entry.count}{_FORMATS[entry.item_type]}", raw))
    return [reader.text() for _ in range(entry.count)]


class _Reader:
    """Reads the header from front to back through a window."""

    def __init__(self, source: ByteSource, start: int = 0, reading: str = "the file") -> None:
        self._source = source
        self._window_bytes = _FIRST_WINDOW
        self._start = start  # of the window
        self._window = bytearray()
        self._position = start
        self._reading = reading  # what errors begin with

    def hold(self, raw: bytes) -> None:
        """Take `raw` as what the file holds at the current position."""
        self._start, self._window = self._position, bytearray(raw)

    def header(self) -> GgufHeader:
        version, tensor_count, entry_count = self._preamble()
        metadata: dict[str, KeyValue] = {}
        for number in range(entry_count):
            self._reading = f"metadata entry {number}"
            entry = self._key_value()
            if entry.key in metadata:
                raise self._error("occurs twice")
            metadata[entry.key] = entry
        alignment = self._alignment(metadata)
        infos: list[tuple[str, tuple[int, ...], int, int]] = []
        names: set[str] = set()
        for number in range(tensor_count):
            self._reading = f"tensor {number} of the table"
            info = self._tensor_info()
            if info[0] in names:
                raise self._error("occurs twice")
            names.add(info[0])
            infos.append(info)
        data_start = self._position + -self._position % alignment
        return GgufHeader(
            version, alignment, metadata, self._placed(infos, data_start, alignment), data_start
        )

    def _preamble(self) -> tuple[int, int, int]:
        magic = self.take(4)
        if magic != MAGIC:
            start = bytes(self._window[:32]).lower()
            hint = next((f": this is {what}" for begin, what in _LOOKALIKES if start.startswith(begin)), "")
            raise self._error(f"does not begin with GGUF{hint}")
        version = self._number("I")
        if version and version & 0xFFFF == 0:
            raise self._error(
                "is a big-endian GGUF file; llama.cpp on this machine refuses it too: get the little-endian one"
            )
        if version == 1:
            raise self._error(
                "is GGUF version 1 of 2023, which llama.cpp no longer reads: convert the model again"
            )
        if version not in VERSIONS:
            raise self._error(f"is GGUF version {version}; versions 2 and 3 are known")
        tensors, entries = struct.unpack("<QQ", self.take(16))
        if entries > MAX_ENTRIES or tensors > MAX_TENSORS:
            raise self._error(
                f"announces {entries:,} metadata entries and {tensors:,} tensors; "
                f"at most {MAX_ENTRIES:,} and {MAX_TENSORS:,} are read"
            )
        left = self._source.size - self._position
        if tensors * _LEAST_TENSOR + entries * _LEAST_KEY_VALUE > left:
            raise self._error(
                f"announces {entries:,} metadata entries and {tensors:,} tensors, but has {left:,} bytes left for them"
            )
        return version, tensors, entries

    def _key_value(self) -> KeyValue:
        offset = self._position
        key = self.text(MAX_KEY_BYTES)
        if not key:
            raise self._error("has an empty key")
        self._reading = f"key '{printable(key)}'"
        kind = self._number("I")
        if kind != ValueType.ARRAY:
            value = self._position
            self._skip(kind)
            return KeyValue(key, kind, offset, value, self._position - offset, raw=self._held(value))
        item, count = self._number("I"), self._number("Q")
        if item == ValueType.ARRAY:
            raise self._error("is an array of arrays, which llama.cpp refuses")
        if item not in _SIZES and item != ValueType.STRING:
            raise self._error(f"has items of the unknown type {item}")
        self._check_length(count, "an array")
        value = self._position
        if item == ValueType.STRING:
            self._skip_texts(count)
        else:
            self._advance(count * _SIZES[item])
        return KeyValue(key, kind, offset, value, self._position - offset, item, count, self._held(value))

    def _held(self, start: int) -> bytes | None:
        """The bytes from `start` to the current position, if they are few and all in the window."""
        begin, end = start - self._start, self._position - self._start
        return (
            bytes(self._window[begin:end])
            if begin >= 0 and end - begin <= _SHORT and end <= len(self._window)
            else None
        )

    def _skip(self, kind: int) -> None:
        if kind == ValueType.STRING:
            self._skip_texts(1)
        elif kind in _SIZES:
            self._advance(_SIZES[kind])
        else:
            raise self._error(f"has the unknown type {kind}")

    def _skip_texts(self, count: int) -> None:
        """Step over strings; a vocabulary has hundreds of thousands."""
        if count * 8 > self._source.size - self._position:
            raise self._cut_off(count * 8)
        unpack, at = struct.Struct("<Q").unpack_from, self._position - self._start
        last = len(self._window) - 8  # where a length can begin in the window
        for _ in range(count):
            if at > last:
                self._position = self._start + at
                self._fill(8)
                at, last = 0, len(self._window) - 8
            (length,) = unpack(self._window, at)
            at += 8 + length
            if length > MAX_ITEMS or self._start + at > self._source.size:
                self._position = self._start + at - length
                self._check_length(length, "a string")
                raise self._cut_off(length)
        self._position = self._start + at

    def _alignment(self, metadata: dict[str, KeyValue]) -> int:
        entry = metadata.get(ALIGNMENT_KEY)
        if entry is None:
            return DEFAULT_ALIGNMENT
        self._reading = f"key '{ALIGNMENT_KEY}'"
        if entry.type != ValueType.U32:
            raise self._error(f"is of type {ValueType.NAMES[entry.type]}, llama.cpp needs u32")
        alignment = read_value(self._source, entry)
        assert isinstance(alignment, int)
        if alignment < LEAST_ALIGNMENT or alignment & (alignment - 1):
            raise self._error(f"is {alignment}, not a power of two from {LEAST_ALIGNMENT}")
        return alignment

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset."""
        length = self._number("Q")
        if length > MAX_NAME_BYTES:
            raise self._error(f"has a name of {length:,} bytes; llama.cpp allows {MAX_NAME_BYTES}")
        name = self.take(length).decode("utf-8", "surrogateescape")
        self._reading = f"tensor '{printable(name)}'"
        if "\0" in name:
            raise self._error("has a zero byte in its name, where llama.cpp cuts it")
        dimensions = self._number("I")
        if dimensions > MAX_DIMENSIONS:
            raise self._error(f"has {dimensions:,} dimensions; llama.cpp allows {MAX_DIMENSIONS}")
        shape = struct.unpack(f"<{dimensions}Q", self.take(8 * dimensions))
        if math.prod(max(size, 1) for size in shape) >= MAX_ELEMENTS:
            raise self._error(f"has an impossible shape: {shape}")
        return name, tuple(reversed(shape)), self._number("I"), self._number("Q")

    def _placed(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], data_start: int, alignment: int
    ) -> dict[str, GgufTensorInfo]:
        """The tensors with checked types, sizes and positions."""
        tensors: dict[str, GgufTensorInfo] = {}
        expected = 0
        for name, shape, number, offset in infos:
            self._reading = f"tensor '{printable(name)}'"
            kind = self._block_type(number)
            columns = shape[-1] if shape else 1
            if columns % kind.block_values:
                raise self._error(
                    f"has rows of {columns:,} values, not a multiple of the {kind.block_values} of {kind.name}"
                )
            if (shape[-2] if len(shape) > 1 else 1) % kind.row_group:
                raise self._error(
                    f"has a number of rows that is not a multiple of the {kind.row_group} that {kind.name} interleaves"
                )
            nbytes = math.prod(shape[:-1]) * kind.row_bytes(columns) if columns else 0
            if offset != expected:
                raise self._error(
                    f"has its data at {offset:,}, expected {expected:,}: tensors must follow one another, padded"
                )
            if data_start + offset + nbytes > self._source.size:
                raise self._error(
                    f"ends at byte {data_start + offset + nbytes:,}, but the file at {self._source.size:,}: "
                    "it is cut off; download it again"
                )
            tensors[name] = GgufTensorInfo(name, kind, shape, data_start + offset, nbytes)
            expected += nbytes + -nbytes % alignment
        return tensors

    def _block_type(self, number: int) -> BlockType:
        kind = BLOCK_TYPES.get(number)
        if kind is None:
            why = REFUSED_TYPES.get(number, "unknown to this version of moe-surgery")
            raise self._error(f"has type {number}: {why}")
        return kind

    def value(self, kind: int) -> object:
        """The scalar or string at the current position."""
        return self.text() if kind == ValueType.STRING else self._number(_FORMATS[kind])

    def text(self, limit: int = MAX_ITEMS) -> str:
        length = self._number("Q")
        self._check_length(length, "a string", limit)
        return self.take(length).decode("utf-8", "surrogateescape")

    def take(self, nbytes: int) -> bytes:
        """The next `nbytes` bytes."""
        if self._position + nbytes > self._start + len(self._window) or self._position < self._start:
            self._fill(nbytes)
        at = self._position - self._start
        self._position += nbytes
        return bytes(self._window[at : at + nbytes])

    def _number(self, code: str) -> int:
        (value,) = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))
        return value  # type: ignore[no-any-return]

    def _advance(self, nbytes: int) -> None:
        if self._position + nbytes > self._source.size:
            raise self._cut_off(nbytes)
        self._position += nbytes

    def _fill(self, nbytes: int) -> None:
        """Move the window to the current position, with at least `nbytes` in it."""
        if self._position + nbytes > self._source.size:
            raise self._cut_off(nbytes)
        self._window = bytearray()  # two would take twice the memory
        wanted = max(nbytes, self._window_bytes)
        window = bytearray(min(wanted, self._source.size - self._position))
        self._source.read_into(self._position, memoryview(window), cache=True)
        self._start, self._window = self._position, window
        self._window_bytes = min(2 * self._window_bytes, _LARGEST_WINDOW)  # fewer requests to the hub

    def _check_length(self, length: int, what: str, limit: int = MAX_ITEMS) -> None:
        if length > limit:
            raise self._error(f"has {what} of {length:,}; at most {limit:,} are allowed")

    def _cut_off(self, nbytes: int) -> InvalidInputError:
        return self._error(
            f"needs {nbytes:,} bytes at {self._position:,}, but the file ends at {self._source.size:,}: "
            "it is cut off or damaged; download it again"
        )

    def _error(self, problem: str) -> InvalidInputError:
        return InvalidInputError(f"{self._source.where}: {self._reading} {problem}")
