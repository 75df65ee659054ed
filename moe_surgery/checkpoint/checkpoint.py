"""A checkpoint as bytes: config, index, shards, and the location of each tensor. Knows nothing about models."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from moe_surgery.checkpoint.additions import ADAPTER_CONFIG, is_addition, is_weights, note_of
from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.index import MAX_INDEX_BYTES, Index, parse_index
from moe_surgery.checkpoint.local_file import LocalFolder
from moe_surgery.checkpoint.other_formats import other_format_hint
from moe_surgery.checkpoint.resolve import model_to_fetch, resolve
from moe_surgery.checkpoint.shard import Shard
from moe_surgery.checkpoint.source import Folder, read_small
from moe_surgery.checkpoint.strict_json import parse_json
from moe_surgery.checkpoint.text import printable
from moe_surgery.errors import InvalidInputError, OutputError

__all__ = ["CONFIG_NAME", "INDEX_NAME", "Checkpoint", "TensorRef", "open_folder"]

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
MAX_CONFIG_BYTES = 10_000_000
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Location of a tensor: `nbytes` bytes at `offset` of the shard file `shard`."""

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def rows(self, start: int, count: int) -> TensorRef:
        """Rows [start, start + count) along axis 0, under the same name."""
        step = self.nbytes // self.shape[0]
        return replace(
            self, shape=(count, *self.shape[1:]), offset=self.offset + start * step, nbytes=count * step
        )


class Checkpoint:
    """An open checkpoint: headers are read and validated, weights are not.

    `config` is the parsed config.json, `tensors` maps names to `TensorRef`s, `shards` maps file
    names to open `Shard`s, `files` opens any file of the folder. `notes` says which files are
    ignored. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        files: Folder,
        config: dict[str, object],
        shards: dict[str, Shard],
        tensors: dict[str, TensorRef],
        side_files: tuple[str, ...],
        index: Index | None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.files = files
        self.path = files.path
        self.config: Mapping[str, object] = MappingProxyType(config)
        self.shards = shards
        self.tensors = tensors
        self.side_files = side_files
        self.index = index
        self.notes = notes

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str] | Folder,
        *,
        ignore_unlisted: bool = False,
        ops: FileOps | None = None,
    ) -> Checkpoint:
        """Open a folder, one .safetensors file, `example:tiny`, or a model on the hub (see `open_folder`).

        With a `Folder`, config.json, the index and shards are read through it.

        Files that transformers ignores are ignored: shards missing from the index, other files next to
        a model.safetensors without an index, adapters, value heads, backups. `ignore_unlisted`
        also skips a model.safetensors next to an index, and tensors in its shards that it does not name,
        instead of refusing them. Raises InvalidInputError for malformed files, OutputError for unreadable ones.
        """
        files, only = (path, None) if isinstance(path, Folder) else _resolve_folder(path, ops)
        folder, listing = files.path, files.listing()
        config = _read_config(files, listing)
        index = _read_index(files, listing) if only is None else None
        names = [only] if only is not None else _shard_names(folder, listing, index, ignore_unlisted)
        notes = () if only is not None else _notes(folder, listing, names, index)
        with ExitStack() as stack:
            stack.callback(files.close)
            shards = _open_shards(files, names, stack)
            tensors = _collect(folder, shards, index, ignore_unlisted)
            stack.pop_all()
        if index is not None:
            index = replace(index, weight_map={})  # `tensors` says the same
        return cls(files, config, shards, tensors, _side_files(listing), index, notes)

    @property
    def config_path(self) -> Path:
        return self.path / CONFIG_NAME

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    def where(self, tensor: str) -> str:
        """`file: tensor 'name'`, for messages."""
        ref = self.tensors.get(tensor)
        file = self.path / ref.shard if ref else self.path
        return f"{printable_path(file)}: tensor '{printable(tensor)}'"

    def check_unchanged(self) -> None:
        """Raise InvalidInputError if any shard was replaced or written to since it was opened."""
        for shard in self.shards.values():
            shard.check_unchanged()

    def close(self) -> None:
        for shard in self.shards.values():
            shard.close()
        self.files.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_folder(checkpoint: str | os.PathLike[str] | Folder) -> Folder:
    """The files of a checkpoint, for anything that `Checkpoint.open` takes.

    A path that exists wins, then a complete model in the hub's cache, then the hub itself, unless HF_HUB_OFFLINE
    is set. Raises as `resolve` and `HubFolder`.
    """
    return checkpoint if isinstance(checkpoint, Folder) else _resolve_folder(checkpoint, None)[0]


def _resolve_folder(name: str | os.PathLike[str], ops: FileOps | None) -> tuple[Folder, str | None]:
    """The folder, and the file in it if `name` is that of one file."""
    if (model := model_to_fetch(name)) is not None:
        from moe_surgery.checkpoint.hub_folder import HubFolder

        return HubFolder(*model, ops=ops), None
    path = resolve(name)
    return (LocalFolder(path, ops), None) if path.is_dir() else (LocalFolder(path.parent, ops), path.name)


def _open_shards(files: Folder, names: list[str], stack: ExitStack) -> dict[str, Shard]:
    """The shards `names`, each closed with `stack`."""

    def open_shard(name: str) -> Shard:
        return Shard(name, files.open(name))

    if files.concurrent_opens == 1:
        return {name: stack.enter_context(open_shard(name)) for name in names}
    with ThreadPoolExecutor(files.concurrent_opens, "open") as pool:
        opening = {name: pool.submit(open_shard, name) for name in names}
        try:
            return {name: stack.enter_context(future.result()) for name, future in opening.items()}
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            for future in opening.values():
                if future.done() and not future.cancelled() and future.exception() is None:
                    future.result().close()
            raise


def _read_config(files: Folder, listing: Mapping[str, bool]) -> dict[str, object]:
    path = files.path / CONFIG_NAME
    if CONFIG_NAME not in listing:
        raise OutputError(
            f"{printable_path(path)}: not found; a checkpoint needs its config.json next to the shards"
            + other_format_hint(path.parent)
        )
    with files.open(CONFIG_NAME) as source:
        raw = read_small(source, limit=MAX_CONFIG_BYTES, what="a model config")
    config = parse_json(raw, where=printable_path(path), allow_floats=True)
    if not isinstance(config, dict):
        raise InvalidInputError(f"{printable_path(path)}: not a JSON object")
    return config


def _read_index(files: Folder, listing: Mapping[str, bool]) -> Index | None:
    if INDEX_NAME not in listing:
        return None
    with files.open(INDEX_NAME) as source:
        raw = read_small(source, limit=MAX_INDEX_BYTES, what="a shard index")
        return parse_index(raw, file=source.where)


def _shard_names(
    folder: Path, listing: Mapping[str, bool], index: Index | None, ignore_unlisted: bool
) -> list[str]:
    present = {name for name in listing if name.endswith(".safetensors")}
    if index is None:
        own = {name for name in present if not name.startswith(".") and not is_addition(name)}
        if not own:
            raise OutputError(
                f"{printable_path(folder)}: holds no .safetensors file{other_format_hint(folder)}"
            )
        return [SINGLE_NAME] if SINGLE_NAME in own else sorted(own)
    listed = set(index.weight_map.values())
    if missing := sorted(listed - present):
        raise OutputError(
            f"{printable_path(folder / missing[0])}: listed in {INDEX_NAME} but missing "
            f"({len(missing)} of {len(listed)} shards); download the rest of the checkpoint"
        )
    if SINGLE_NAME in present - listed and not ignore_unlisted:
        raise InvalidInputError(
            f"{printable_path(folder / SINGLE_NAME)}: not listed in {INDEX_NAME}, and programs differ in which of "
            "the two they load; remove one, or pass `ignore_unlisted=True` to read what the index lists"
        )
    return sorted(listed)


def _notes(
    folder: Path, listing: Mapping[str, bool], read: list[str], index: Index | None
) -> tuple[str, ...]:
    ignored = {name for name, is_file in listing.items() if is_file and not name.startswith(".")} - set(read)
    reason = f"{SINGLE_NAME} is the whole model" if index is None else f"not listed in {INDEX_NAME}"
    note = note_of(ignored, reason)
    return () if note is None else (f"{printable_path(folder)}: {note}",)


def _collect(
    folder: Path, shards: Mapping[str, Shard], index: Index | None, ignore_unlisted: bool
) -> dict[str, TensorRef]:
    """All tensors by name; each must be in exactly one shard, the one that the index names."""
    tensors: dict[str, TensorRef] = {}
    files = {name: printable_path(folder / name) for name in shards}
    for ref in _refs(shards):
        file = files[ref.shard]
        if index is not None and (listed := index.weight_map.get(ref.name)) != ref.shard:
            if listed is None and ignore_unlisted:
                continue
            problem = f"says it is in {printable(listed)}" if listed else "does not list it"
            raise InvalidInputError(f"{file}: tensor '{printable(ref.name)}': {INDEX_NAME} {problem}")
        if ref.name in tensors:
            raise InvalidInputError(
                f"{file}: tensor '{printable(ref.name)}' is also in {printable(tensors[ref.name].shard)}"
            )
        tensors[ref.name] = ref
    if index is not None and (lost := sorted(set(index.weight_map) - set(tensors))):
        raise InvalidInputError(
            f"{printable_path(folder / index.weight_map[lost[0]])}: tensor '{printable(lost[0])}' is missing, "
            f"although {INDEX_NAME} lists it"
        )
    return tensors


def _refs(shards: Mapping[str, Shard]) -> Iterator[TensorRef]:
    """The tensors of all shards, whose headers let go of them: many names take much memory."""
    for name, shard in shards.items():
        start = shard.header.data_start
        for info in shard.take_tensors():
            yield TensorRef(info.name, name, info.dtype, info.shape, start + info.begin, info.nbytes)


def _side_files(listing: Mapping[str, bool]) -> tuple[str, ...]:
    """Regular files that travel with a checkpoint: not weights, config or index, not hidden.

    Weights in other formats and backups still hold all experts; with an adapter's configuration, PEFT
    would load a different model.
    """
    skipped = (CONFIG_NAME, INDEX_NAME, ADAPTER_CONFIG)
    return tuple(
        name
        for name, is_file in sorted(listing.items())
        if is_file and name not in skipped and not name.startswith(".") and not is_weights(name)
    )
