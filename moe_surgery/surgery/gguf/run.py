"""Executes a `GgufPruneProgram`: writes its files beside their place, journalled, and moves them there at the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.gguf.model_file import GgufModel
from moe_surgery.checkpoint.local_file import LocalFile
from moe_surgery.checkpoint.staging import Staging
from moe_surgery.checkpoint.writer import remove_leftover, write_file
from moe_surgery.engine.digest import digest_file
from moe_surgery.engine.fetch import OnFetch, remote_shards, to_fetch
from moe_surgery.engine.output import OnBytes, check_space
from moe_surgery.engine.run import FETCHED_SEGMENT_BYTES, FolderRun, WrittenFile
from moe_surgery.errors import NetworkError, OutputError
from moe_surgery.surgery.gguf.producer import gguf_producer
from moe_surgery.surgery.gguf.program import GgufOutputFile, GgufPruneProgram
from moe_surgery.surgery.manifest import FileRecord, TensorRecord, manifest_bytes
from moe_surgery.surgery.run import Outcome

__all__ = ["MANIFEST_SUFFIX", "run_gguf_program"]

MANIFEST_SUFFIX: Final = ".surgery.json"
"""Follows the name of the (first) output file."""
SEGMENT_BYTES: Final = 1 << 30
"""How often the journal records an output file: a kill loses at most this much of it (`FETCHED_SEGMENT_BYTES` where the
model is on the hub)."""
_PUBLISHING: Final = "publishing"


def run_gguf_program(
    program: GgufPruneProgram,
    model: GgufModel,
    out: Path,
    *,
    overwrite: bool = False,
    manifest: bool = False,
    ignore_free_space: bool = False,
    progress: OnBytes | None = None,
    on_fetch: OnFetch | None = None,
    ops: FileOps | None = None,
    segment: int = SEGMENT_BYTES,
) -> Outcome:
    """Write the files of `program` into the folder of `out`, whose names have passed `check_gguf_outputs`.

    `manifest`: also the file of digests that `verify` reads, beside the first one. `progress` is called with bytes of
    files processed, `on_fetch` with what is left to be fetched over a network, before it is. An interrupted run, and
    one whose source can no longer be reached, leaves its partial folder, and the next one resumes within the file,
    after the last whole `segment` (bytes). On any other error nothing is left, but for what an earlier run wrote where
    this one has not begun to write. The first file appears last.

    Raises DiskFullError before the first byte if the output does not fit, and when space runs out during the run;
    OutputError, InvalidInputError for files that cannot be written or read.
    """
    ops = ops or FileOps()
    salt = repr([s.stamp for _, s in sorted(model.shards.items())])
    with Staging(out, program.digest(salt), ops) as staging:
        segment = min(segment, FETCHED_SEGMENT_BYTES) if remote_shards(model) else segment
        run = FolderRun(staging, model.shards, ops, progress or (lambda _: None), segment=segment)
        try:
            names = [file.name for file in program.files]
            _reclaim(program, staging, ops)
            _check_free_names([*names, names[0] + MANIFEST_SUFFIX], staging.out, overwrite)
            finished = run.resume(program.files)
            resumed = [f for f in program.files if f.name in finished]
            todo = [f for f in program.files if f.name not in finished]
            left = sum(f.nbytes - run.begun(f) for f in todo)
            if not ignore_free_space:
                check_space(sum(f.nbytes for f in todo) - run.bytes_reserved, out, staging.folder, ops)
            fetch = to_fetch(todo, [], model, run.begun) if on_fetch else None
            if on_fetch and fetch:
                on_fetch(fetch)
            finished |= run.write(todo, gguf_producer)
            model.check_unchanged()
            _publish(program, staging, finished, ops, manifest=manifest, overwrite=overwrite)
        except NetworkError:
            raise
        except Exception:
            if not run.holds_earlier_work:
                staging.discard()
            raise
    return Outcome(
        left,
        program.nbytes - left,
        tuple(f.name for f in resumed),
        run.bytes_shared,
        None,
    )


def _publish(
    program: GgufPruneProgram,
    staging: Staging,
    finished: dict[str, WrittenFile],
    ops: FileOps,
    *,
    manifest: bool,
    overwrite: bool,
) -> None:
    names = [file.name for file in program.files]
    described = names[0] + MANIFEST_SUFFIX
    if manifest:
        records = {file.name: _record(file, finished[file.name]) for file in program.files}
        remove_leftover(staging.folder / described, ops)
        write_file(staging.folder / described, manifest_bytes(program, records, None), ops)
        names.append(described)
    staging.record({"name": _PUBLISHING})
    if not manifest:  # one of an output that is replaced
        remove_leftover(staging.out.with_name(described), ops)
    staging.publish_files(names, overwrite=overwrite)


def _record(file: GgufOutputFile, written: WrittenFile) -> FileRecord:
    """The digests of a finished file; those of tensors include the zeros after them."""
    tensors = {
        tensor.name: TensorRecord(tensor.dtype, tensor.shape, digest)
        for tensor, digest in zip(file.weights, written.tensors[1:], strict=True)
    }
    return FileRecord(file.nbytes, written.digest, tensors)


def _reclaim(program: GgufPruneProgram, staging: Staging, ops: FileOps) -> None:
    """Take back what a run that was killed while it published had already moved."""
    recorded = {str(entry["name"]): entry for entry in staging.finished}
    if _PUBLISHING not in recorded:
        return
    first, *others = program.files
    if staging.out.with_name(first.name).is_file():
        return  # all of it was there, or another program's: then its name is taken
    remove_leftover(staging.out.with_name(first.name + MANIFEST_SUFFIX), ops)
    for file in others:
        moved, place = staging.out.with_name(file.name), staging.folder / file.name
        if place.exists() or not moved.is_file() or file.name not in recorded:
            continue
        with LocalFile(moved, ops) as opened:
            digest = digest_file(opened, file, lambda _: None)
        if digest is not None and digest.whole == recorded[file.name]["xxh3_128"]:
            ops.rename(moved, place)


def _check_free_names(names: list[str], out: Path, overwrite: bool) -> None:
    """Raise OutputError where one of the files exists, unless they are to be replaced."""
    for name in names:
        target = out.with_name(name)
        if not os.path.lexists(target):
            continue
        if not overwrite:
            raise OutputError(
                f"{printable_path(target)}: exists; choose another name, or pass `overwrite=True` to replace it"
            )
        if target.is_symlink() or not target.is_file():
            raise OutputError(
                f"{printable_path(target)}: is not a regular file; `overwrite=True` will not replace it"
            )
