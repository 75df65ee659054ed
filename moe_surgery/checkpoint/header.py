"""The safetensors header: read once, checked in full, trusted afterwards.

A file is eight bytes of little-endian header length, the header as a JSON object, and the data
section. `frame_header` determines where the data section begins, `_validate` checks everything
else; the users of a `Header` need not check again that names are unique, that dtype, shape and
offsets agree, and that the tensors cover the data section without gap or overlap.

Refused although the safetensors library accepts it: equal keys (the library keeps the last), entries
written as arrays, unknown fields in an entry, `__metadata__: null`, dimensions past 2**63 - 1, shapes
whose non-zero dimensions overflow, rank, names and counts beyond the constants below.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from xxhash import xxh3_128

from moe_surgery.checkpoint.dtypes import tensor_nbytes
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.source import ByteSource
from moe_surgery.checkpoint.strict_json import parse_json
from moe_surgery.checkpoint.text import describe_value, printable
from moe_surgery.errors import InvalidInputError

__all__ = [
    "MAX_HEADER_BYTES",
    "MAX_NAME_BYTES",
    "MAX_RANK",
    "MAX_TENSORS",
    "Header",
    "TensorInfo",
    "build_header",
    "check_name",
    "frame_header",
    "parse_header",
    "read_header",
]

MAX_HEADER_BYTES = 100_000_000
"""JSON bytes of a header, padding included: the library's own limit."""

MAX_TENSORS = 1_000_000
"""Tensors in one file. Reading a header takes about 12 microseconds and 900 bytes a tensor."""

MAX_RANK = 16
"""Dimensions of a tensor; the library has no limit, checkpoints use up to five."""

MAX_NAME_BYTES = 4096
"""UTF-8 bytes of a tensor name; the library has no limit, checkpoints stay under 200."""

_LENGTH_BYTES = 8
_HINT_BYTES = 64
_METADATA_KEY = "__metadata__"
_FIELDS = ("dtype", "shape", "data_offsets")
_LOOKALIKES = (
    (b"version https://git-lfs", "a Git LFS pointer: fetch the file itself with `git lfs pull`"),
    (b"PK\x03\x04", "a zip archive, as torch.save writes: convert it to safetensors"),
    (b"\x80\x02", "a Python pickle: convert it to safetensors"),
    (b"\x80\x03", "a Python pickle: convert it to safetensors"),
    (b"\x80\x04", "a Python pickle: convert it to safetensors"),
    (b"\x80\x05", "a Python pickle: convert it to safetensors"),
    (b"GGUF", "a GGUF file: the checkpoint it was made from is needed"),
    (b"<!doctype html", "an HTML page: the download failed or needs a login"),
    (b"<html", "an HTML page: the download failed or needs a login"),
    (b"{", "plain JSON text, without the header length in front"),
)


class TensorInfo(NamedTuple):
    """One tensor: `begin` and `end` are byte offsets within the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header.

    `tensors` is in offset order (empty tensors of one offset by name), `data_start` and `file_size`
    are in bytes, `digest` is xxh3_128 in hexadecimal over all bytes before the data section.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    file_size: int
    digest: str


def read_header(source: ByteSource) -> Header:
    """The header of the file `source`.

    Raises InvalidInputError for a file that breaks the format, OutputError if it cannot be read.
    """
    size, file = source.size, source.where
    data_start = frame_header(source.read(0, min(size, _HINT_BYTES)), size, file=file)
    return parse_header(source.read(0, data_start), size, file=file)


def parse_header(raw: bytes, file_size: int, *, file: str) -> Header:
    """The header in `raw`, which is everything before the data section of a file of `file_size` bytes.

    Raises InvalidInputError for anything the format, or a limit of this module, forbids.
    """
    data_start = frame_header(raw, file_size, file=file)
    where = printable_path(file)
    if len(raw) != data_start:
        raise InvalidInputError(f"{where}: got {len(raw)} bytes of header, expected {data_start}")
    root = parse_json(raw[_LENGTH_BYTES:], where=f"{where}: header")
    tensors, metadata = _validate(root, file_size - data_start, where)
    return Header(tensors, metadata, data_start, file_size, xxh3_128(raw).hexdigest())


def frame_header(prefix: bytes, file_size: int, *, file: str) -> int:
    """Where the data section of a file begins, in bytes, from the file's first bytes and its size.

    Eight bytes suffice; with up to 64 the error can also say what the file looks like. The result
    is at most `file_size` and 8 + MAX_HEADER_BYTES, so it is safe to read that much.
    Raises InvalidInputError for a file too short for its header, or a header over the limit.
    """
    problem = None
    if file_size < _LENGTH_BYTES or len(prefix) < _LENGTH_BYTES:
        problem = f"{file_size} bytes are too few for a safetensors file, which begins with an 8-byte length"
    else:
        length = int.from_bytes(prefix[:_LENGTH_BYTES], "little")
        if length > MAX_HEADER_BYTES:
            problem = f"header length {length} is over the limit of {MAX_HEADER_BYTES}"
        elif length > file_size - _LENGTH_BYTES:
            problem = f"header length {length} does not fit a file of {file_size} bytes: truncated?"
        elif length == 0:
            problem = "header length is 0, expected at least the 2 bytes of an empty JSON object"
    if problem is None:
        return _LENGTH_BYTES + length
    raise InvalidInputError(f"{printable_path(file)}: {problem}{_lookalike(prefix)}")


def build_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    *,
    metadata: Mapping[str, str] | None = None,
    pad_to: int = 8,
    residue: int = 0,
) -> bytes:
    """The bytes before the data section for `tensors` (name, dtype, shape), laid out in that order.

    Data is laid out without gaps from offset 0. Spaces pad the JSON so that the length of the result,
    in bytes, is `residue` modulo `pad_to`. The same arguments give the same bytes; metadata come
    first, sorted by key. The result has passed `parse_header`.

    Raises InvalidInputError for what `parse_header` refuses: repeated or overlong names, unknown
    dtypes, sizes past 64 bits; ValueError unless 0 <= residue < pad_to.
    """
    if not 0 <= residue < pad_to:
        raise ValueError(f"residue {residue} must be in 0 .. {pad_to - 1}, below pad_to")
    raw = bytearray(_LENGTH_BYTES) + b"{"
    if metadata is not None:
        raw += _encoded(f'"{_METADATA_KEY}":{_dumps(dict(sorted(metadata.items())))},')
    position = 0
    for name, dtype, shape in tensors:
        end = position + tensor_nbytes(dtype, shape)
        sizes = ",".join(map(str, shape))
        entry = f'{{"dtype":"{dtype}","shape":[{sizes}],"data_offsets":[{position},{end}]}}'
        raw += _encoded(f"{_dumps(name)}:{entry},")
        position = end
    if raw[-1:] == b",":
        del raw[-1:]
    raw += b"}"
    raw += b" " * ((residue - len(raw)) % pad_to)
    raw[:_LENGTH_BYTES] = (len(raw) - _LENGTH_BYTES).to_bytes(_LENGTH_BYTES, "little")
    header = bytes(raw)
    raw.clear()  # of many tensors: all of it is parsed next
    parse_header(header, len(header) + position, file="header to be written")
    return header


def check_name(name: str) -> None:
    """Raise InvalidInputError, without a file name, for a tensor name beyond MAX_NAME_BYTES."""
    size = len(name) if name.isascii() or len(name) > MAX_NAME_BYTES else len(name.encode())
    if size > MAX_NAME_BYTES:
        raise InvalidInputError(f"name is longer than {MAX_NAME_BYTES} bytes")


def _lookalike(prefix: bytes) -> str:
    """What the file looks like; "" if its first bytes may be a header length."""
    if not any(prefix[4:_LENGTH_BYTES]):
        return ""
    start = prefix[:_HINT_BYTES].lstrip().lower()
    for magic, meaning in _LOOKALIKES:
        if start.startswith(magic.lower()):
            return f"; this looks like {meaning}"
    return ""


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InvalidInputError("header to be written: lone surrogate in a name or in metadata") from None


def _validate(root: object, data_size: int, where: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Every rule of the header beyond its length and its JSON, in one place."""
    if not isinstance(root, dict):
        raise InvalidInputError(f"{where}: header must be a JSON object, got {describe_value(root)}")
    metadata = _metadata(root.pop(_METADATA_KEY, {}), where)
    if len(root) > MAX_TENSORS:
        raise InvalidInputError(f"{where}: {len(root)} tensors are over the limit of {MAX_TENSORS}")
    infos = []
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    while root:  # from the end, so that entries are freed as they are read
        name, entry = root.popitem()
        try:
            infos.append(_tensor_info(name, entry, shapes))
        except InvalidInputError as error:
            raise InvalidInputError(f"{where}: tensor '{printable(name)}': {error}") from None
    infos.sort(key=lambda info: (info.begin, info.end, info.name))
    _check_coverage(infos, data_size, where)
    return {info.name: info for info in infos}, metadata


def _metadata(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise InvalidInputError(f"{where}: {_METADATA_KEY} must be an object, got {describe_value(value)}")
    for key, text in value.items():
        if not isinstance(text, str):
            raise InvalidInputError(
                f"{where}: {_METADATA_KEY} '{printable(key)}' must be a string, got {describe_value(text)}"
            )
    return value


def _tensor_info(name: str, entry: object, shapes: dict[tuple[int, ...], tuple[int, ...]]) -> TensorInfo:
    """One tensor; equal `shapes` become one object, as do dtypes."""
    check_name(name)
    if not isinstance(entry, dict):
        raise InvalidInputError(f"entry must be an object, got {describe_value(entry)}")
    for field in _FIELDS:
        if field not in entry:
            raise InvalidInputError(f"{field} is missing")
    if len(entry) != len(_FIELDS):
        unknown = next(field for field in entry if field not in _FIELDS)
        raise InvalidInputError(f"unknown field '{printable(unknown)}'")
    dtype = entry["dtype"]
    if not isinstance(dtype, str):
        raise InvalidInputError(f"dtype must be a string, got {describe_value(dtype)}")
    shape = _integers(entry["shape"], "shape")
    if len(shape) > MAX_RANK:
        raise InvalidInputError(f"{len(shape)} dimensions are over the limit of {MAX_RANK}")
    offsets = _integers(entry["data_offsets"], "data_offsets")
    if len(offsets) != 2:
        raise InvalidInputError(f"data_offsets must be two integers, got {len(offsets)}")
    begin, end = offsets
    if begin > end:
        raise InvalidInputError(f"data_offsets run backwards, from {begin} to {end}")
    nbytes = tensor_nbytes(dtype, shape)
    if end - begin != nbytes:
        raise InvalidInputError(
            f"{dtype} of shape {list(shape)} takes {nbytes} bytes, data_offsets give {end - begin}"
        )
    return TensorInfo(name, sys.intern(dtype), shapes.setdefault(shape, shape), begin, end)


def _integers(values: object, field: str) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise InvalidInputError(f"{field} must be an array, got {describe_value(values)}")
    for value in values:
        # bool is an int in Python, but true is not a number in JSON
        if type(value) is not int or value < 0:
            raise InvalidInputError(f"{field} must hold non-negative integers, got {describe_value(value)}")
    return tuple(values)


def _check_coverage(infos: list[TensorInfo], data_size: int, where: str) -> None:
    position = 0
    previous = ""
    for info in infos:
        if info.begin != position:
            kind = "leaves a gap after" if info.begin > position else "overlaps"
            neighbour = f"tensor '{printable(previous)}'" if position or previous else "the header"
            raise InvalidInputError(
                f"{where}: tensor '{printable(info.name)}': data begin at {info.begin}, "
                f"expected {position}: it {kind} {neighbour}"
            )
        position = info.end
        previous = info.name
    if position > data_size:
        raise InvalidInputError(
            f"{where}: truncated: tensor '{printable(previous)}' ends at byte {position} of the data, "
            f"but the file has {data_size}"
        )
    if position < data_size:
        raise InvalidInputError(
            f"{where}: {data_size - position} bytes after the last tensor belong to no tensor: "
            f"expected {position} bytes of data, got {data_size}"
        )
