"""The shard index of a checkpoint (`model.safetensors.index.json`): which file holds which tensor.

File names in it are untrusted and will be opened: they must be plain names of files next to
the index, nothing that any system could interpret as a path.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.header import MAX_TENSORS, check_name
from moe_surgery.checkpoint.strict_json import parse_json
from moe_surgery.checkpoint.text import describe_value, printable
from moe_surgery.errors import InvalidInputError

__all__ = ["MAX_INDEX_BYTES", "Index", "build_index", "parse_index", "safe_shard_name"]

MAX_INDEX_BYTES = 100_000_000
"""Bytes of an index file; the one of a 1-trillion-parameter model takes about 10 MB."""

_SUFFIX = ".safetensors"
_MAX_FILE_NAME_BYTES = 255
_FORBIDDEN = "/\\:"


@dataclass(frozen=True, slots=True)
class Index:
    """A checked index: tensor name to shard file name, in the order of the file.

    `total_size` is the claimed number of bytes of all tensors, None if absent;
    `metadata` is the whole metadata object. Claims are checked against the shards by their reader.
    """

    weight_map: dict[str, str]
    total_size: int | None
    metadata: dict[str, object]


def parse_index(raw: bytes, *, file: str) -> Index:
    """The index in `raw`; `file` names it in errors.

    Raises InvalidInputError for more than MAX_INDEX_BYTES or MAX_TENSORS, for what `parse_json`
    refuses (repeated keys among it), a missing or malformed weight_map, a shard name that is not a plain file
    name, two shard names that a file system may treat as the same file, a total_size that is not
    a whole number of bytes.
    """
    where = printable_path(file)
    if len(raw) > MAX_INDEX_BYTES:
        raise InvalidInputError(f"{where}: {len(raw)} bytes are over the limit of {MAX_INDEX_BYTES}")
    root = parse_json(raw, where=where, allow_floats=True)
    if not isinstance(root, dict):
        raise InvalidInputError(f"{where}: index must be a JSON object, got {describe_value(root)}")
    metadata = root.get("metadata", {})
    if not isinstance(metadata, dict):
        raise InvalidInputError(f"{where}: metadata must be an object, got {describe_value(metadata)}")
    if "weight_map" not in root:
        raise InvalidInputError(f"{where}: weight_map is missing")
    weight_map = _weight_map(root["weight_map"], where, file)
    return Index(weight_map, _total_size(metadata, where), metadata)


def safe_shard_name(name: object, *, file: str) -> str:
    """`name`, if it is the plain name of a .safetensors file on every system; `file` is the index.

    Raises InvalidInputError for anything else: separators of any system, drive letters, hidden
    names, unprintable characters, more than 255 bytes, another suffix, not a string.
    """
    if not isinstance(name, str):
        problem: str | None = "must be a string"
    elif not name:
        problem = "is empty"
    elif len(name) > _MAX_FILE_NAME_BYTES or len(name.encode("utf-8", "replace")) > _MAX_FILE_NAME_BYTES:
        problem = f"is longer than {_MAX_FILE_NAME_BYTES} bytes"
    elif any(character in _FORBIDDEN for character in name):
        problem = "must be a plain file name, not a path"
    elif not name.isprintable():
        problem = "holds unprintable characters"
    elif name.startswith("."):
        problem = "begins with a dot"
    elif not name.endswith(_SUFFIX):
        problem = f"does not end in {_SUFFIX}"
    else:
        return name
    quoted = f"'{printable(name)}'" if isinstance(name, str) else describe_value(name)
    raise InvalidInputError(f"{printable_path(file)}: shard name {quoted} {problem}")


def build_index(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """An index file as the hub's tools write it: keys sorted, indented by 2, ending in a newline.

    `total_size` counts bytes of tensor data over all shards.
    Raises InvalidInputError for what `parse_index` refuses.
    """
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}
    raw = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    parse_index(raw, file="index to be written")
    return raw


def _weight_map(value: object, where: str, file: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise InvalidInputError(f"{where}: weight_map must be an object, got {describe_value(value)}")
    if len(value) > MAX_TENSORS:
        raise InvalidInputError(f"{where}: {len(value)} tensors are over the limit of {MAX_TENSORS}")
    shards: dict[str, str] = {}
    for tensor, shard in value.items():
        try:
            check_name(tensor)
        except InvalidInputError as error:
            raise InvalidInputError(f"{where}: tensor '{printable(tensor)}': {error}") from None
        if not isinstance(shard, str) or shard not in shards:
            safe = safe_shard_name(shard, file=file)
            shards[safe] = safe
        value[tensor] = shards[shard]  # one object for each shard
    _check_distinct_files(shards, where)
    return value


def _check_distinct_files(shards: Iterable[str], where: str) -> None:
    """Case-insensitive and normalising file systems would open one file for both names."""
    seen: dict[str, str] = {}
    for shard in shards:
        key = unicodedata.normalize("NFC", unicodedata.normalize("NFC", shard).casefold())
        if key in seen:
            raise InvalidInputError(
                f"{where}: shard names '{printable(seen[key])}' and '{printable(shard)}' "
                "are the same file on case-insensitive file systems"
            )
        seen[key] = shard


def _total_size(metadata: dict[str, object], where: str) -> int | None:
    value = metadata.get("total_size")
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidInputError(f"{where}: metadata.total_size must be bytes, got {describe_value(value)}")
    return value
