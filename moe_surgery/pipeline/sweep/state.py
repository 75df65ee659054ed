"""`index.json` of a sweep: its variants, which of them are verified, and their figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.files import printable_path, read_small_file
from moe_surgery.checkpoint.strict_json import parse_json
from moe_surgery.checkpoint.writer import remove_leftover, write_file
from moe_surgery.errors import InvalidInputError
from moe_surgery.selection.fields import is_integer

__all__ = ["INDEX_JSON", "Entry", "State", "load_state", "save_state"]

INDEX_JSON = "index.json"
FORMAT = "moe-surgery.sweep"
VERSION = 1
MAX_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class Entry:
    """A variant. `nbytes` are those of all its files, `dense_nbytes` of its shards of dense tensors.

    `manifest` is the digest of its manifest, with which it was verified; None where it was not yet. `figures` are
    those of an evaluation, by domain and "" for all texts: {"tokens", "cross_entropy", "perplexity", "kl",
    "agreement"}.
    """

    name: str
    ranking: str
    experts: int
    top_k: int
    store: str
    parameters: int
    active_parameters: int
    nbytes: int
    dense_nbytes: int
    manifest: str | None = None
    figures: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)


@dataclass(slots=True)
class State:
    """`model` is the source's name, `identity` that of its headers, `stamp` of its files when they were last read.

    `experts`, `top_k` and `nbytes` (of its shards) are the source's, `full` its figures, as those of an `Entry`.
    """

    model: str
    model_type: str
    identity: str
    stamp: str
    experts: int
    top_k: int
    nbytes: int
    full: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    variants: dict[str, Entry] = field(default_factory=dict)

    def sort(self) -> None:
        """Order the variants by ranking, format and number of experts."""
        entries = sorted(self.variants.values(), key=lambda e: (e.ranking, e.store, e.experts))
        self.variants = {entry.name: entry for entry in entries}


def save_state(state: State, folder: Path, ops: FileOps) -> None:
    """Write `index.json`; it appears whole or not at all."""
    fields = {f: getattr(state, f) for f in ("model", "model_type", "identity", "stamp", "experts", "top_k")}
    root = {
        "format": FORMAT,
        "version": VERSION,
        **fields,
        "bytes": state.nbytes,
        "figures": state.full,
        "variants": [asdict(entry) for entry in state.variants.values()],
    }
    path = folder / INDEX_JSON
    remove_leftover(path.with_name(f".{path.name}.tmp"), ops)
    write_file(path, (json.dumps(root, indent=1, allow_nan=False) + "\n").encode(), ops)


def load_state(folder: Path) -> State | None:
    """The state in `folder`, None where there is none.

    Raises InvalidInputError for a damaged file or one of another program, OutputError where it cannot be read.
    """
    path = folder / INDEX_JSON
    if not path.exists():
        return None
    where = printable_path(path)
    root = parse_json(
        read_small_file(path, limit=MAX_BYTES, what="the index of a sweep"), where=where, allow_floats=True
    )
    if not isinstance(root, dict) or root.get("format") != FORMAT:
        raise InvalidInputError(f"{where}: is not the index of a sweep; choose another folder")
    if not is_integer(root.get("version"), VERSION):
        raise InvalidInputError(
            f"{where}: version {str(root.get('version'))[:20]} of the index is not supported; upgrade moe-surgery"
        )
    try:
        entries = [Entry(**entry) for entry in root["variants"]]
        text = ("model", "model_type", "identity", "stamp")
        numbers = ("experts", "top_k", "bytes")
        if not all(isinstance(root[key], str) for key in text):
            raise TypeError(f"{', '.join(text)} must be texts")
        if not all(type(root[key]) is int for key in numbers):
            raise TypeError(f"{', '.join(numbers)} must be integers")
        if not all(_is_entry(entry) for entry in entries):
            raise TypeError("variants have fields of other types")
        state = State(*(root[key] for key in (*text, *numbers)))
        state.full, state.variants = root["figures"], {entry.name: entry for entry in entries}
        return state
    except (KeyError, TypeError) as error:
        raise InvalidInputError(
            f"{where}: damaged ({error}); remove it, and the same command verifies all variants again"
        ) from None


def _is_entry(entry: Entry) -> bool:
    texts = (entry.name, entry.ranking, entry.store, *([] if entry.manifest is None else [entry.manifest]))
    numbers = (entry.experts, entry.top_k, entry.parameters, entry.active_parameters)
    return (
        all(isinstance(text, str) for text in texts)
        and all(type(n) is int for n in (*numbers, entry.nbytes, entry.dense_nbytes))
        and isinstance(entry.figures, dict)
    )
