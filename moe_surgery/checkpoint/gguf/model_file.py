"""A GGUF model: one file, or the files of a split set. Knows nothing about models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.gguf.block_types import BlockType
from moe_surgery.checkpoint.gguf.header import GgufHeader, KeyValue, ValueType, read_gguf_header, read_value
from moe_surgery.checkpoint.shard import OpenFile
from moe_surgery.checkpoint.source import ByteSource, Folder
from moe_surgery.checkpoint.text import printable
from moe_surgery.errors import InvalidInputError, OutputError

__all__ = ["GgufModel", "GgufShard", "GgufTensor", "split_names"]

SPLIT_NAME: Final = re.compile(r"(?s)(?P<prefix>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")
MAX_VALUE_BYTES: Final = 64 << 20
"""Ours, of a value that is read rather than copied: it bounds memory."""
SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Location of a tensor: `nbytes` bytes at `offset` of the file `shard`; `shape` slowest dimension first."""

    name: str
    shard: str
    type: BlockType
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def dtype(self) -> str:
        """The name of the type."""
        return self.type.name


class GgufShard(OpenFile):
    """A GGUF file over `source`, which it closes."""

    def __init__(self, name: str, source: ByteSource) -> None:
        """Read and validate the header. Raises InvalidInputError (malformed) or OutputError (cannot be read)."""
        super().__init__(name, source)
        try:
            self.header: GgufHeader = read_gguf_header(source)
        except BaseException:
            source.close()
            raise


class GgufModel:
    """An open model: headers are read and validated, weights are not.

    `metadata` is that of the first file, which has all but the split keys; `tensors` are those of all
    files in order, `shards` the open files by name. Close it, or use it as a context manager.
    """

    def __init__(self, files: Folder, name: str, shards: Mapping[str, GgufShard]) -> None:
        self.files = files
        self.name = name
        self.shards = shards
        first = shards[name]
        self.metadata: Mapping[str, KeyValue] = first.header.metadata
        self.alignment = first.header.alignment
        self.tensors: dict[str, GgufTensor] = {}
        for shard in shards.values():
            for info in shard.header.tensors.values():
                if info.name in self.tensors:
                    raise InvalidInputError(
                        f"{shard.where}: tensor '{printable(info.name)}' is also in "
                        f"{printable(self.tensors[info.name].shard)}"
                    )
                self.tensors[info.name] = GgufTensor(
                    info.name, shard.name, info.type, info.shape, info.offset, info.nbytes
                )

    @classmethod
    def open(cls, files: Folder, name: str) -> GgufModel:
        """The model in the file `name` of `files`, and in the others of its set where it is the first of one.

        Raises InvalidInputError for a malformed file, one that is not the first of its set, and a set that does
        not belong together; OutputError for one that is missing or cannot be read.
        """
        with ExitStack() as stack:
            stack.callback(files.close)
            first = stack.enter_context(GgufShard(name, files.open(name)))
            shards = {name: first}
            names = split_names(first)
            for other in names[1:]:
                if not files.is_file(other):
                    raise OutputError(
                        f"{printable_path(files.path / other)}: not found; the model is split over "
                        f"{len(names)} files that must lie in one folder"
                    )
                shards[other] = stack.enter_context(GgufShard(other, files.open(other)))
            _check_set(shards)
            model = cls(files, name, shards)
            stack.pop_all()
        return model

    @property
    def path(self) -> Path:
        """The (first) file, as shown in messages."""
        return self.files.path / self.name

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(shard.nbytes for shard in self.shards.values())

    def value(self, key: str) -> object:
        """The value of `key`: a number, bool, str or a list of them; None where there is no such key.

        Raises InvalidInputError for one of more than `MAX_VALUE_BYTES`, as `read_value`, and where it cannot be read.
        """
        entry = self.metadata.get(key)
        if entry is None:
            return None
        if entry.nbytes > MAX_VALUE_BYTES:
            raise InvalidInputError(
                f"{printable_path(self.path)}: key '{printable(key)}' has {entry.nbytes:,} bytes, more than it can need"
            )
        return read_value(self.shards[self.name].source, entry)

    def where(self, tensor: str) -> str:
        """`file: tensor 'name'`, for messages."""
        found = self.tensors.get(tensor)
        file = self.files.path / found.shard if found else self.path
        return f"{printable_path(file)}: tensor '{printable(tensor)}'"

    def check_unchanged(self) -> None:
        """Raise InvalidInputError if any file was replaced or written to since it was opened."""
        for shard in self.shards.values():
            shard.check_unchanged()

    def close(self) -> None:
        for shard in self.shards.values():
            shard.close()
        self.files.close()

    def __enter__(self) -> GgufModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def split_names(first: GgufShard) -> list[str]:
    """The names of the files of the set that `first` begins, by its own name alone where it is a whole model.

    Raises InvalidInputError where the name and the keys of the file disagree, or it is not the first.
    """
    count = _integer(first, SPLIT_COUNT, ValueType.U16) or 1
    if count == 1:
        return [first.name]
    named = SPLIT_NAME.fullmatch(first.name)
    if (number := _integer(first, SPLIT_NUMBER, ValueType.U16)) != 0:
        if number is None:
            raise InvalidInputError(f"{first.where}: has key '{SPLIT_COUNT}' but not '{SPLIT_NUMBER}'")
        begin = f"{printable(named['prefix'])}-00001-of-{named['count']}.gguf" if named else "the first one"
        raise InvalidInputError(f"{first.where}: is file {number + 1} of a set of {count}; pass {begin}")
    if named is None or int(named["number"]) != 1 or int(named["count"]) != count:
        raise InvalidInputError(
            f"{first.where}: is the first of {count} files, so its name must end in -00001-of-{count:05d}.gguf, "
            "as llama.cpp requires; give the files of the set their names back"
        )
    return [f"{named['prefix']}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


def _integer(shard: GgufShard, key: str, kind: int) -> int | None:
    """The value of `key`, which llama.cpp reads as type `kind`; None where there is no such key."""
    entry = shard.header.metadata.get(key)
    if entry is None:
        return None
    if entry.type != kind:
        names = ValueType.NAMES
        raise InvalidInputError(
            f"{shard.where}: key '{key}' is of type {names[entry.type]}, llama.cpp needs {names[kind]}"
        )
    value = read_value(shard.source, entry)
    assert isinstance(value, int)
    return value


def _check_set(shards: Mapping[str, GgufShard]) -> None:
    """Raise InvalidInputError unless the files are those of one set, in order."""
    if len(shards) == 1:
        return
    first = next(iter(shards.values()))
    announced = _integer(first, SPLIT_TENSORS, ValueType.I32)
    if announced is None:
        raise InvalidInputError(f"{first.where}: has key '{SPLIT_COUNT}' but not '{SPLIT_TENSORS}'")
    for number, shard in enumerate(shards.values()):
        for key, kind, expected in (
            (SPLIT_NUMBER, ValueType.U16, number),
            (SPLIT_COUNT, ValueType.U16, len(shards)),
            (SPLIT_TENSORS, ValueType.I32, announced),
        ):
            actual = _integer(shard, key, kind)
            if actual != expected and (actual is not None or key != SPLIT_TENSORS):
                found = "missing" if actual is None else f"{actual:,}"
                raise InvalidInputError(
                    f"{shard.where}: key '{key}' is {found}, expected {expected:,}: "
                    f"it does not belong to the set that {printable(first.name)} begins"
                )
        if shard.header.alignment != first.header.alignment:
            raise InvalidInputError(
                f"{shard.where}: has alignment {shard.header.alignment}, {printable(first.name)} has "
                f"{first.header.alignment}: it does not belong to the set"
            )
    total = sum(len(shard.header.tensors) for shard in shards.values())
    if announced != total:
        raise InvalidInputError(
            f"{first.where}: key '{SPLIT_TENSORS}' is {announced:,}, but the {len(shards)} files of the set "
            f"have {total:,} tensors"
        )
