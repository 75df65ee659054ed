"""Checks before the first byte is written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_surgery.checkpoint.checkpoint import CONFIG_NAME, Checkpoint
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.resolve import check_is_path
from moe_surgery.errors import OutputError, UsageError
from moe_surgery.surgery.manifest import is_ours
from moe_surgery.surgery.names import MANIFEST_NAME

if TYPE_CHECKING:
    from moe_surgery.checkpoint.gguf.model_file import GgufModel

__all__ = [
    "check_folder_of_outputs",
    "check_gguf_outputs",
    "check_output",
    "check_output_file",
    "checked_gguf_path",
]


def check_output(checkpoint: Checkpoint, out: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """The absolute output path, if it is safe to write there.

    Raises UsageError where `out` is, contains or is inside the source, or looks like a source
    (`example:tiny`); OutputError where it exists (or, with `overwrite`, is not a folder with a manifest of
    this package), or its parent is not writable.
    """
    target = _separate_path(checkpoint, out, "folder")
    if os.path.lexists(target):
        _check_replaceable(target, overwrite)
    _check_writable(target.parent)
    return target


def check_folder_of_outputs(checkpoint: Checkpoint, out: str | os.PathLike[str]) -> Path:
    """The absolute path of a folder that is to hold several outputs; it need not exist.

    Raises UsageError where it is, contains or is inside the source; OutputError where it is something else than a
    folder, or cannot be written.
    """
    target = _separate_path(checkpoint, out, "folder")
    if os.path.lexists(target) and not target.is_dir():
        raise OutputError(f"{printable_path(target)}: is not a folder; choose another name")
    _check_writable(target if target.is_dir() else target.parent)
    return target


def check_output_file(checkpoint: Checkpoint, out: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """The same for an output that is one file; with `overwrite` it may be any regular file.

    Raises UsageError where `out` is a folder or inside the source; OutputError as `check_output`.
    """
    return _checked_file(_separate_path(checkpoint, out, "file"), overwrite)


def checked_gguf_path(out: str | os.PathLike[str]) -> Path:
    """The absolute path of an output that is to be a GGUF file.

    Raises UsageError for a name that does not end in .gguf, OutputError where its folder does not exist.
    """
    target = _absolute(out, "file")
    if target.suffix != ".gguf":
        raise UsageError(f"{printable_path(target)}: the source is a GGUF file, so name the output OUT.gguf")
    return target


def check_gguf_outputs(model: GgufModel, targets: Sequence[Path], *, overwrite: bool) -> None:
    """Check the paths of all files that are made of a GGUF model; they may lie beside it.

    Raises UsageError where one is a file of the source or a folder; OutputError where the first one exists (or, with
    `overwrite`, is not a regular file), or its folder is not writable.
    """
    sources = [shard.source.path for shard in model.shards.values()]
    for target in targets:
        if target.exists() and any(path is not None and os.path.samefile(target, path) for path in sources):
            raise UsageError(f"{printable_path(target)}: is the source; choose another name")
        if target.is_dir():
            raise UsageError(f"{printable_path(target)}: is a folder; pass the name of a file")
    _checked_file(targets[0], overwrite)


def _checked_file(target: Path, overwrite: bool) -> Path:
    if target.is_dir():
        raise UsageError(f"{printable_path(target)}: is a folder; pass the name of a file")
    if os.path.lexists(target):
        if not overwrite:
            raise OutputError(
                f"{printable_path(target)}: exists; choose another name, or pass `overwrite=True` to replace it"
            )
        if target.is_symlink() or not target.is_file():
            raise OutputError(
                f"{printable_path(target)}: is not a regular file; `overwrite=True` will not replace it"
            )
    _check_writable(target.parent)
    return target


def _separate_path(checkpoint: Checkpoint, out: str | os.PathLike[str], what: str) -> Path:
    """The absolute output path, which must not be, contain or be inside the source."""
    target = _absolute(out, what)
    for source in _source_folders(checkpoint):
        _check_separate(target, source)
    return target


def _absolute(out: str | os.PathLike[str], what: str) -> Path:
    """The absolute path of the output, a file or a folder, whose parent exists."""
    check_is_path(out)
    path = Path(out)
    if not path.name or path.name == "..":
        raise UsageError(f"{printable_path(out)}: pass the name of the new {what}")
    parent = path.parent
    if not parent.is_dir():
        raise OutputError(f"{printable_path(parent)}: no such folder; create it first")
    return parent.resolve() / path.name


def _check_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{printable_path(folder)}: no permission to write there")


def _source_folders(checkpoint: Checkpoint) -> set[Path]:
    """The source's folder and, where its files are links (the hub cache), the folders of their targets."""
    folder = checkpoint.files.on_disk
    paths = [None if folder is None else folder / CONFIG_NAME]
    paths += [shard.source.path for shard in checkpoint.shards.values()]
    folders = {path.resolve().parent for path in paths if path is not None}
    return folders if folder is None else folders | {folder.resolve()}


def _check_separate(target: Path, source: Path) -> None:
    real = target.resolve()
    if real == source or (real.exists() and os.path.samefile(real, source)):
        raise UsageError(f"{printable_path(target)}: is the source checkpoint; choose another output folder")
    if source in real.parents:
        raise UsageError(
            f"{printable_path(target)}: is inside the source checkpoint; choose a folder outside it"
        )
    if real in source.parents:
        raise UsageError(
            f"{printable_path(target)}: contains the source checkpoint; choose another output folder"
        )


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not overwrite:
        raise OutputError(
            f"{printable_path(target)}: exists; choose another name, or pass `overwrite=True` to replace a "
            "checkpoint that moe-surgery wrote"
        )
    if target.is_symlink() or not target.is_dir() or not is_ours(target):
        raise OutputError(
            f"{printable_path(target)}: was not written by moe-surgery (no {MANIFEST_NAME}); `overwrite=True` will not "
            "replace it. Delete it yourself."
        )
