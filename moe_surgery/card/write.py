"""Writes a new card into an existing checkpoint and updates its manifest."""

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

    README.md is replaced first and the manifest second, each atomically and flushed to disk. If the
    run stops in between, `verify` reports the README.md (as unlisted, if there was none before);
    running it again fixes that.

    Raises OutputError if README.md was edited since it was written and `overwrite` is off, or if files
    cannot be written, and any error of `load_manifest`.
    """
    folder, ops = Path(resolve(out)), ops or FileOps()
    manifest, readme = folder / MANIFEST_NAME, folder / README_NAME
    record = load_manifest(manifest).files.get(README_NAME)
    raw, content = read_small_file(manifest, limit=MAX_BYTES, what="a manifest"), text.encode()
    new = with_file(raw, README_NAME, content)
    if os.path.lexists(readme) and not overwrite:
        current = _content(readme)
        unchanged = record is not None and current is not None and _digest(current) == record.xxh3_128
        if current != content and not unchanged:
            raise OutputError(
                f"{printable_path(readme)}: was not written by moe-surgery or was edited since; keep a copy and pass "
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
