"""A new card for a checkpoint that is already there, with its manifest kept in step."""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.files import printable_path, read_small_file
from moe_surgery.checkpoint.resolve import resolve
from moe_surgery.checkpoint.writer import output_failure, remove_leftover, write_file
from moe_surgery.errors import InvalidInputError, OutputError
from moe_surgery.surgery.manifest import MAX_BYTES, load_manifest, with_file
from moe_surgery.surgery.names import MANIFEST_NAME, README_NAME

__all__ = ["write_card"]

MAX_CARD_BYTES = 100_000_000


def write_card(
    out: str | os.PathLike[str], text: str, *, overwrite: bool = False, ops: FileOps | None = None
) -> Path:
    """Make `text` (of `make_card`) the README.md of the pruned checkpoint `out`; returns its path.

    README.md is replaced first and the manifest second, each atomically and flushed to disk. A run
    that ends in between leaves a README.md that `verify` names (or, where there was none before,
    notes as not listed); running it again sets that right.

    Raises OutputError where README.md was changed since it was written (by hand, perhaps) and
    `overwrite` is off, where files cannot be written, and as `load_manifest`.
    """
    folder, ops = Path(resolve(out)), ops or FileOps()
    manifest, readme = folder / MANIFEST_NAME, folder / README_NAME
    record = load_manifest(manifest).files.get(README_NAME)
    raw, content = read_small_file(manifest, limit=MAX_BYTES, what="a manifest"), text.encode()
    new = with_file(raw, README_NAME, content)
    if os.path.lexists(readme) and not overwrite:
        found = _content(readme)
        ours = record is not None and found is not None and _digest(found) == record.xxh3_128
        if found != content and not ours:
            raise OutputError(
                f"{printable_path(readme)}: was not written by this tool, or was changed since; keep a copy and pass "
                "`overwrite=True` to replace it"
            )
    for path, data in ((readme, content), (manifest, new)):
        _replace(path, data, ops)
    return readme


def _replace(path: Path, content: bytes, ops: FileOps) -> None:
    remove_leftover(path.with_name(f".{path.name}.tmp"), ops)
    write_file(path, content, ops)
    try:
        ops.fsync_dir(path.parent)
    except OSError as error:
        raise output_failure(error, path.parent, "flush") from error


def _content(path: Path) -> bytes | None:
    try:
        return read_small_file(path, limit=MAX_CARD_BYTES, what="a model card")
    except InvalidInputError:  # a folder, or far too large
        return None


def _digest(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)
