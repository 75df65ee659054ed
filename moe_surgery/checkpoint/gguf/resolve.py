"""Names of GGUF models: a path, or a file of a model on the hub as `owner/name[@revision]:FILE_OR_TAG`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.gguf.model_file import SPLIT_NAME, GgufModel
from moe_surgery.checkpoint.hub import is_hub_id
from moe_surgery.checkpoint.kinds import GGUF, kind_of
from moe_surgery.checkpoint.local_file import LocalFolder
from moe_surgery.checkpoint.source import Folder
from moe_surgery.checkpoint.text import printable
from moe_surgery.errors import OutputError

__all__ = ["is_gguf", "open_gguf"]

SUFFIX: Final = ".gguf"
MOST_LISTED: Final = 40
_HUB_FILE: Final = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+?))?:([^:]+)", re.ASCII)
# Files of a repository that are not the model itself.
_NOT_MODELS: Final = re.compile(r"mmproj|imatrix", re.IGNORECASE)


def is_gguf(name: str | os.PathLike[str]) -> bool:
    """Whether `name` is a GGUF file, or would be one: by its content, its suffix, or as a file on the hub."""
    text = os.fspath(name)
    path = Path(text)
    if path.is_file():
        return kind_of(path) == GGUF or path.suffix == SUFFIX
    return not path.is_dir() and (path.suffix == SUFFIX or _hub_file(text) is not None)


def open_gguf(name: str | os.PathLike[str], ops: FileOps | None = None) -> GgufModel:
    """The model in the GGUF file `name`, with the other files of its set.

    `name` is a path, or `owner/name[@revision]:FILE_OR_TAG`: a file of a model on the hub by its path there, or
    the one whose name ends in the tag, such as Q4_K_M. A path that exists wins. A file that lies in the hub's
    cache is read from there, and only from there with HF_HUB_OFFLINE.

    Raises OutputError where there is no such file, or several, and as `GgufModel.open` and `HubFolder`.
    """
    text = os.fspath(name)
    path = Path(text)
    found = None if path.exists() else _hub_file(text)
    if found is None:
        if not path.is_file():
            what = "is a folder, not a file" if path.is_dir() else "no such file"
            raise OutputError(f"{printable_path(path)}: {what}")
        return GgufModel.open(LocalFolder(path.parent, ops), path.name)
    repository, revision, wanted = found
    files = _hub_folder(repository, revision, ops)
    inside, _, base = _chosen(files, wanted, printable(text)).rpartition("/")
    folder = files.folder(inside) if inside else files
    assert folder is not None
    return GgufModel.open(folder, base)


def _hub_file(text: str) -> tuple[str, str | None, str] | None:
    """Repository, revision and file or tag of a name of a file on the hub."""
    match = _HUB_FILE.fullmatch(text)
    if match is None or not is_hub_id(match[1]) or text.startswith("."):
        return None
    return match[1], match[2], match[3]


def _hub_folder(repository: str, revision: str | None, ops: FileOps | None) -> Folder:
    try:
        from huggingface_hub import constants
    except ImportError:
        raise OutputError(
            f"{repository}: reading from the hub needs huggingface_hub: pip install 'moe-surgery[hub]'"
        ) from None
    if constants.HF_HUB_OFFLINE:
        from moe_surgery.checkpoint.resolve import snapshot

        cached = snapshot(repository, revision or "")
        if cached is None:
            raise OutputError(f"{repository}: not in the local hub cache, and HF_HUB_OFFLINE is set")
        return LocalFolder(cached, ops)
    from moe_surgery.checkpoint.hub_folder import HubFolder

    return HubFolder(repository, revision, ops=ops)


def _chosen(files: Folder, wanted: str, name: str) -> str:
    """The path in `files` of the one that `wanted` means, a path or a tag."""
    models = [path for path in _paths(files) if path.endswith(SUFFIX) and not _NOT_MODELS.search(path)]
    firsts = [
        path for path in models if (split := SPLIT_NAME.fullmatch(path)) is None or int(split["number"]) == 1
    ]
    if wanted in models:
        return wanted
    tag = re.compile(rf"(?:.*[-._/])?{re.escape(wanted)}", re.IGNORECASE)
    matching = [path for path in firsts if tag.fullmatch(_stem(path))]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise OutputError(
            f"{name}: several files end in that: {_listed(matching)}; name one of them after the colon"
        )
    there = _listed(firsts) if firsts else "no GGUF model"
    raise OutputError(f"{name}: no such GGUF file; there is: {there}")


def _stem(path: str) -> str:
    """A path without suffix, and number in a set."""
    split = SPLIT_NAME.fullmatch(path)
    return split["prefix"] if split else path.removesuffix(SUFFIX)


def _paths(files: Folder, inside: str = "") -> Iterator[str]:
    """Every file of a folder and those inside it, sorted."""
    for name, is_file in sorted(files.listing().items()):
        if is_file:
            yield inside + name
        elif not name.startswith(".") and (folder := files.folder(name)) is not None:
            yield from _paths(folder, f"{inside}{name}/")


def _listed(paths: list[str]) -> str:
    shown = ", ".join(map(printable, paths[:MOST_LISTED]))
    return shown + (f" and {len(paths) - MOST_LISTED} more" if len(paths) > MOST_LISTED else "")
