"""One variant: pruned, its dense shards shared with a finished variant, and verified. Runs in any process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.files import open_regular, printable_path, read_small_file
from moe_surgery.checkpoint.local_file import FileStamp
from moe_surgery.errors import MoeSurgeryError, OutputError, VerificationError
from moe_surgery.families import identify_model
from moe_surgery.pipeline.pruning import prune_program
from moe_surgery.progress import OnProgress, Progress
from moe_surgery.selection.plan import Plan
from moe_surgery.surgery.compiler import DEFAULT_SHARD_SIZE
from moe_surgery.surgery.manifest import MAX_BYTES, FileRecord, Manifest, load_manifest
from moe_surgery.surgery.names import MANIFEST_NAME
from moe_surgery.surgery.preflight import check_output
from moe_surgery.surgery.program import Program, SourceFile
from moe_surgery.surgery.run import SharedFile, run_program
from moe_surgery.surgery.verify import verify_checkpoint

__all__ = [
    "Job",
    "Layout",
    "checked_files",
    "is_result",
    "make_variant",
    "manifest_digest",
    "manifest_of",
    "program_of",
    "shared_files",
]


@dataclass(frozen=True, slots=True)
class Layout:
    """How all variants are stored, as for `prune`. `separate_dense`: dense tensors have shards of their own."""

    store: str = "keep"
    max_shard_size: int = DEFAULT_SHARD_SIZE
    mtp: str | None = None
    base_model: str | None = None
    ignore_unlisted: bool = False
    ignore_free_space: bool = False
    separate_dense: bool = True


@dataclass(frozen=True, slots=True)
class Job:
    """A variant to make, unless `out` is already its folder, and to verify.

    `donor` is the folder of a verified variant with which it shares its dense shards, None where it writes them.
    """

    checkpoint: str
    out: Path
    plan: Plan
    layout: Layout
    donor: Path | None


def make_variant(job: Job, progress: OnProgress | None = None, ops: FileOps | None = None) -> None:
    """Do `job`: begin where an earlier run of it was stopped. `progress` as of `prune` and `verify`.

    Raises as `prune`, and VerificationError where what was written is not what is on the disk.
    """
    ops = ops or FileOps()
    with Checkpoint.open(job.checkpoint, ignore_unlisted=job.layout.ignore_unlisted) as opened:
        sources = tuple(SourceFile(n, s.nbytes, s.header.digest) for n, s in sorted(opened.shards.items()))
        if not is_result(job.out, job.plan, sources, job.layout):
            program = program_of(opened, job.plan, job.layout)
            shared = {} if job.donor is None else shared_files(job.donor, program) or {}
            run_program(
                program,
                opened,
                check_output(opened, job.out, overwrite=False),
                ignore_free_space=job.layout.ignore_free_space,
                progress=_bytes(progress, program.nbytes),
                ops=ops,
                shared=shared,
            )
    checked = {} if job.donor is None else checked_files(job.donor)
    verification = verify_checkpoint(job.out, checked=checked, progress=progress)
    if not verification.ok:
        raise VerificationError(
            f"{verification.problems[0]}; remove {printable_path(job.out)} and run again to make it once more"
        )


def program_of(opened: Checkpoint, plan: Plan, layout: Layout) -> Program:
    """The program that writes a variant."""
    return prune_program(
        opened,
        identify_model(opened),
        plan,
        store=layout.store,
        max_shard_size=layout.max_shard_size,
        mtp=layout.mtp,
        base_model=layout.base_model,
        separate_dense=layout.separate_dense,
    )


def is_result(out: Path, plan: Plan, sources: tuple[SourceFile, ...], layout: Layout) -> bool:
    """Whether the folder `out` is `plan` applied to the checkpoint of `sources`; False where it does not exist.

    Raises OutputError where it is anything else.
    """
    if not os.path.lexists(out):
        return False
    try:
        manifest = manifest_of(out)
    except MoeSurgeryError as error:
        raise OutputError(f"{error}; {printable_path(out)} is in the way: move or remove it") from None
    same = _plain(manifest.plan) == _plain(plan) and list(manifest.sources) == [asdict(s) for s in sources]
    if (mtp_layers := manifest.plan.mtp_layers) is not None:
        same = same and (mtp_layers == ()) == (layout.mtp == "drop")
    if not same or manifest.repair is not None:
        raise OutputError(
            f"{printable_path(out)}: holds another checkpoint than this sweep would write there (another plan or "
            "source, or repaired); move or remove it, or choose another folder"
        )
    return True


def manifest_of(out: Path) -> Manifest:
    """The manifest of a variant, all of whose files are there in their full size.

    Raises as `load_manifest`, and OutputError for a file that is missing or of another size.
    """
    manifest = load_manifest(out / MANIFEST_NAME)
    for name, record in manifest.files.items():
        path = out / name
        size = -1
        with suppress(OSError):
            size = path.stat().st_size
        if size != record.size:
            found = "missing" if size < 0 else f"{size} bytes"
            raise OutputError(f"{printable_path(path)}: {found}, expected {record.size} bytes")
    return manifest


def manifest_digest(out: Path) -> str:
    """xxh3_128 of the bytes of a variant's manifest, which holds the digests of all its other files."""
    raw = read_small_file(out / MANIFEST_NAME, limit=MAX_BYTES, what="a manifest")
    return xxhash.xxh3_128_hexdigest(raw)


def shared_files(donor: Path, program: Program) -> dict[str, SharedFile] | None:
    """The dense shards of `program`, as the variant in the folder `donor` has them; None where it lacks one."""
    records = {n: r for n, r in manifest_of(donor).files.items() if r.tensors}
    shared: dict[str, SharedFile] = {}
    for shard in program.shards:
        if not shard.dense:
            continue
        for name, record in records.items():
            if record.size == shard.nbytes and _start(donor / name, len(shard.header)) == shard.header:
                shared[shard.name] = SharedFile(donor / name, record)
                break
        else:
            return None
    return shared


def checked_files(donor: Path) -> dict[Hashable, FileRecord]:
    """The shards of a verified variant, for `verify_checkpoint`."""
    files = manifest_of(donor).files
    return {FileStamp.of(os.stat(donor / name)): record for name, record in files.items() if record.tensors}


def _start(path: Path, nbytes: int) -> bytes:
    fd = open_regular(path)
    try:
        return os.pread(fd, nbytes, 0)
    except OSError as error:
        raise OutputError(f"{printable_path(path)}: cannot read: {error.strerror}") from error
    finally:
        os.close(fd)


def _plain(plan: Plan) -> object:
    """The plan as read back from a file, without the experts of MTP layers, which `prune` chooses."""
    return json.loads(json.dumps({**plan.as_dict(), "mtp_layers": None}))


def _bytes(progress: OnProgress | None, total: int) -> Callable[[int], None]:
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(Progress("prune", done, total, "bytes"))

    return advance
