"""Executes a `Program`: writes the shards, journals each when finished, publishes the folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.shard import Shard
from moe_surgery.checkpoint.staging import Staging
from moe_surgery.checkpoint.writer import copy_file, remove_leftover, write_file
from moe_surgery.engine.fetch import OnFetch, remote_shards, to_fetch
from moe_surgery.engine.output import OnBytes, check_space
from moe_surgery.engine.run import FETCHED_SEGMENT_BYTES, FolderRun
from moe_surgery.engine.sharing import share_file
from moe_surgery.errors import NetworkError
from moe_surgery.formats.encode_report import EncodeReport
from moe_surgery.surgery.manifest import FileRecord, manifest_bytes, shard_record
from moe_surgery.surgery.names import MANIFEST_NAME
from moe_surgery.surgery.producer import converts, producer_of
from moe_surgery.surgery.program import Program

__all__ = ["Outcome", "SharedFile", "run_program"]


@dataclass(frozen=True, slots=True)
class SharedFile:
    """A finished shard of another output, and its record there."""

    path: Path
    record: FileRecord


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a run: bytes of shards written now and resumed from an earlier run, and whole shards resumed.

    `conversion` reports conversion to MXFP4: blocks, inexact blocks and relative error; else None. With an adapter
    merged into MXFP4 weights also `update_error`, the error relative to what the adapter adds.
    """

    bytes_written: int
    bytes_resumed: int
    shards_resumed: tuple[str, ...]
    bytes_shared: int
    conversion: Mapping[str, object] | None


def run_program(
    program: Program,
    checkpoint: Checkpoint,
    out: Path,
    *,
    overwrite: bool = False,
    ignore_free_space: bool = False,
    progress: OnBytes | None = None,
    on_fetch: OnFetch | None = None,
    ops: FileOps | None = None,
    also: Mapping[str, Shard] | None = None,
    shared: Mapping[str, SharedFile] | None = None,
) -> Outcome:
    """Write `program` to the new folder `out`. `progress` is called with bytes of shards processed,
    `on_fetch` with what is left to be fetched over a network, before it is. `also` are files that the program reads
    beside the checkpoint's shards. `shared` are, by name, shards that another output already has with the same bytes:
    they share its disk blocks (`engine.sharing`) and are neither read nor written.

    `out` must have passed `check_output`. An interrupted run, and one whose source can no longer be reached,
    leaves its partial folder, and the next one resumes after the finished shards, and within a shard of fetched bytes
    (without conversion) after its last whole `FETCHED_SEGMENT_BYTES`. On any other error nothing is left, but for what
    an earlier run wrote where this one has not begun to write.

    Raises DiskFullError before the first byte if the output does not fit, and when space runs out during the run;
    OutputError, InvalidInputError for files that cannot be written or read.
    """
    ops = ops or FileOps()
    sources = {**checkpoint.shards, **(also or {})}
    salt = repr([s.stamp for _, s in sorted(sources.items())])
    with Staging(out, program.digest(salt), ops) as staging:
        job = _Run(program, checkpoint, sources, staging, ops, progress or (lambda _: None), shared or {})
        try:
            return job.execute(overwrite, ignore_free_space, on_fetch)
        except NetworkError:
            raise
        except Exception:
            if not job.shards.holds_earlier_work:
                staging.discard()
            raise


class _Run:
    def __init__(
        self,
        program: Program,
        checkpoint: Checkpoint,
        sources: Mapping[str, Shard],
        staging: Staging,
        ops: FileOps,
        progress: OnBytes,
        shared: Mapping[str, SharedFile],
    ) -> None:
        self._shared = shared
        self._program = program
        self._checkpoint = checkpoint
        self._sources = sources
        self._staging = staging
        self._ops = ops
        self._fetches = bool(remote_shards(checkpoint))
        # What conversion lost is known of a whole shard only.
        within = self._fetches and not any(map(converts, program.shards))
        self.shards = FolderRun(
            staging, sources, ops, progress, segment=FETCHED_SEGMENT_BYTES if within else None
        )

    def execute(self, overwrite: bool, ignore_free_space: bool, on_fetch: OnFetch | None) -> Outcome:
        shards = [s for s in self._program.shards if s.name not in self._shared]
        finished = self.shards.resume(shards)
        resumed = [s for s in shards if s.name in finished]
        todo = [s for s in shards if s.name not in finished]
        begun = sum(map(self.shards.begun, todo))
        if not ignore_free_space:
            self._check_space(sum(s.nbytes for s in todo) - self.shards.bytes_reserved)
        copies = self._program.copies.values()
        fetch = to_fetch(todo, copies, self._checkpoint, self.shards.begun) if on_fetch else None
        if on_fetch and fetch:
            on_fetch(fetch)
        with self._copying() as copied:
            finished |= self.shards.write(todo, producer_of)
        conversion = _conversion(f.report for f in finished.values())
        records = {s.name: shard_record(s, finished[s.name]) for s in (*resumed, *todo)}
        for name, file in self._shared.items():
            share_file(file.path, self._fresh(name), self._ops)
            records[name] = file.record
        self._write_small_files(records, copied, conversion)
        for source in self._sources.values():
            source.check_unchanged()
        self._staging.publish(overwrite=overwrite)
        return Outcome(
            sum(s.nbytes for s in todo) - begun,
            sum(s.nbytes for s in resumed) + begun,
            tuple(s.name for s in resumed),
            self.shards.bytes_shared,
            conversion,
        )

    def _check_space(self, shard_bytes: int) -> None:
        small = sum(map(len, self._program.texts.values()))
        for name in self._program.copies.values():
            small += self._checkpoint.files.nbytes(name)
        check_space(shard_bytes + small, self._staging.out, self._staging.folder, self._ops)

    @contextmanager
    def _copying(self) -> Iterator[Mapping[str, Future[FileRecord]]]:
        """Side files that are fetched meanwhile, so that a link does not wait for one after the other; by name."""
        with ThreadPoolExecutor(1, "copy") as pool:
            copies = self._program.copies.items() if self._fetches else ()
            try:
                yield {name: pool.submit(self._copy, name, source) for name, source in copies}
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _copy(self, name: str, source: str) -> FileRecord:
        with self._checkpoint.files.open(source) as file:
            return FileRecord(*copy_file(file, self._fresh(name), self._ops))

    def _write_small_files(
        self,
        shards: Mapping[str, FileRecord],
        copied: Mapping[str, Future[FileRecord]],
        conversion: Mapping[str, object] | None,
    ) -> None:
        records = dict(shards)
        for name, source in self._program.copies.items():
            records[name] = copied[name].result() if name in copied else self._copy(name, source)
        for name, content in self._program.texts.items():
            records[name] = FileRecord(len(content), xxhash.xxh3_128_hexdigest(content))
            write_file(self._fresh(name), content, self._ops)
        manifest = manifest_bytes(self._program, records, conversion)
        write_file(self._fresh(MANIFEST_NAME), manifest, self._ops)

    def _fresh(self, name: str) -> Path:
        """The path of a small or shared file, after removing what a killed run left there."""
        path = self._staging.folder / name
        remove_leftover(path, self._ops)
        return path


def _conversion(reports: Iterable[EncodeReport]) -> dict[str, object] | None:
    """The summary of conversion to MXFP4 over all shards, None where nothing was converted.

    The error has six digits: more would depend on the instruction set.
    """
    total = EncodeReport.total(reports)
    if not total.blocks:
        return None
    return {
        "blocks": total.blocks,
        "inexact_blocks": total.inexact_blocks,
        "relative_error": float(f"{total.relative_error:.6g}"),
        **({"update_error": float(f"{total.update_error:.6g}")} if total.update_sq else {}),
    }
