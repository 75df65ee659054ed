"""Executes a `Program`: shards streamed out, journalled as they finish, published as one folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

import xxhash

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.staging import Staging
from moe_surgery.checkpoint.writer import OutputFile, copy_file, output_failure, remove_leftover, write_file
from moe_surgery.errors import DiskFullError, OutputError
from moe_surgery.formats.encode_report import EncodeReport
from moe_surgery.surgery.chunks import Chunk, chunks_of
from moe_surgery.surgery.digest import FileDigest, digest_file
from moe_surgery.surgery.manifest import FileRecord, manifest_bytes
from moe_surgery.surgery.names import MANIFEST_NAME
from moe_surgery.surgery.producer import Producer
from moe_surgery.surgery.program import Copy, OutputShard, Program, Span
from moe_surgery.surgery.stream import stream

__all__ = ["Outcome", "run_program"]

CLONE_BLOCK = 4096

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did: bytes of shards written now and kept from an earlier run, and shards kept.

    `conversion` reports conversion to MXFP4: blocks, inexact blocks and relative error; else None.
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
    progress: Progress | None = None,
    ops: FileOps | None = None,
) -> Outcome:
    """Write `program` to the new folder `out`. `progress` is told the bytes of shards as they pass.

    `out` must have been cleared (`check_output`). Interrupted, the run leaves its partial folder
    and running it again goes on from the finished shards; on any other error nothing is left.

    Raises DiskFullError before the first byte if the output cannot fit, and when space runs out
    meanwhile; OutputError, InvalidInputError for files that cannot be written or read.
    """
    ops = ops or FileOps()
    salt = repr([s.identity for _, s in sorted(checkpoint.shards.items())])
    with Staging(out, program.digest(salt), ops) as staging:
        try:
            job = _Run(program, checkpoint, staging, ops, progress or (lambda _: None))
            return job.execute(overwrite, ignore_free_space)
        except Exception:
            staging.discard()
            raise


class _Run:
    def __init__(
        self, program: Program, checkpoint: Checkpoint, staging: Staging, ops: FileOps, progress: Progress
    ) -> None:
        self._program = program
        self._checkpoint = checkpoint
        self._staging = staging
        self._ops = ops
        self._progress = progress
        self._reflink = True
        self._shared = 0
        self._reports: dict[str, EncodeReport] = {}

    def execute(self, overwrite: bool, ignore_free_space: bool) -> Outcome:
        finished = self._take_up()
        resumed = tuple(s.name for s in self._program.shards if s.name in finished)
        todo = [s for s in self._program.shards if s.name not in finished]
        if not ignore_free_space:
            self._check_space(sum(s.nbytes for s in todo))
        with ThreadPoolExecutor(1, "flush") as flusher:
            flushing: Future[None] | None = None
            for shard in todo:
                file, record = self._write_shard(shard)
                if flushing is not None:
                    try:
                        flushing.result()
                    except BaseException:
                        file.discard()
                        raise
                finished[shard.name] = record
                flushing = flusher.submit(self._finish_shard, shard.name, file, record)
            if flushing is not None:
                flushing.result()
        conversion = _conversion(self._reports.values())
        self._write_small_files(finished, conversion)
        self._checkpoint.check_unchanged()
        self._staging.publish(overwrite=overwrite)
        kept = sum(finished[name].size for name in resumed)
        return Outcome(sum(s.nbytes for s in todo), kept, resumed, self._shared, conversion)

    def _take_up(self) -> dict[str, FileRecord]:
        """Shards that an earlier run finished and whose bytes still have the recorded digest."""
        recorded = {str(e["name"]): e for e in self._staging.finished}
        finished: dict[str, FileRecord] = {}
        for shard in self._program.shards:
            path = self._staging.folder / shard.name
            entry = recorded.get(shard.name)
            if entry is not None and path.is_file():
                record = digest_file(path, shard, self._progress, self._ops)
                if record.size == shard.nbytes and record.xxh3_128 == entry["xxh3_128"]:
                    finished[shard.name] = record
                    self._reports[shard.name] = EncodeReport(*entry["conversion"])  # type: ignore[misc]
                    continue
            remove_leftover(path, self._ops)
        return finished

    def _check_space(self, shard_bytes: int) -> None:
        program = self._program
        try:
            small = sum(map(len, program.texts.values())) + sum(map(os.path.getsize, program.copies.values()))
            free = self._ops.free_bytes(self._staging.folder)
        except OSError as error:
            where = error.filename or self._staging.folder
            raise OutputError(f"{printable_path(where)}: {error.strerror}") from error
        needed = shard_bytes + small
        if needed > free:
            raise DiskFullError(
                f"{printable_path(self._staging.out)}: needs {needed:,} bytes but its file system has {free:,} free; "
                "free some space, keep fewer experts, or pass `ignore_free_space=True`"
            )

    def _write_shard(self, shard: OutputShard) -> tuple[OutputFile, FileRecord]:
        producer = Producer(shard, self._checkpoint.shards)
        digest = FileDigest(shard)
        file = OutputFile(self._staging.folder / shard.name, self._ops)
        try:
            shared = self._share_extents(shard, file)

            def take(chunk: Chunk, buffer: memoryview) -> None:
                digest.update(chunk, buffer)
                self._progress(chunk.nbytes)

            def finish(chunk: Chunk, buffer: memoryview) -> None:
                for begin, end in _gaps(chunk, shared):
                    file.write(buffer[begin - chunk.offset : end - chunk.offset], begin)

            stream(chunks_of(shard), producer.fill, take, finish)
        except BaseException:
            file.discard()
            raise
        self._reports[shard.name] = producer.report()
        return file, digest.record()

    def _share_extents(self, shard: OutputShard, file: OutputFile) -> list[tuple[int, int]]:
        """Reflink the block-aligned inside of copies whose place in a block is the same."""
        shared: list[tuple[int, int]] = []
        for span, offset in _placed_copies(shard) if self._reflink else ():
            if (span.offset - offset) % CLONE_BLOCK:
                continue
            begin = offset + -offset % CLONE_BLOCK
            end = (offset + span.nbytes) // CLONE_BLOCK * CLONE_BLOCK
            if begin >= end:
                continue
            source = self._checkpoint.shards[span.shard].fd
            if not file.clone(source, span.offset + begin - offset, end - begin, begin):
                self._reflink = False
                break
            shared.append((begin, end))
            self._shared += end - begin
        return shared

    def _finish_shard(self, name: str, file: OutputFile, record: FileRecord) -> None:
        try:
            file.publish()
        except BaseException:
            file.discard()
            raise
        try:
            self._ops.fsync_dir(self._staging.folder)
        except OSError as error:
            raise output_failure(error, self._staging.folder, "flush") from error
        self._staging.record(
            {"name": name, "xxh3_128": record.xxh3_128, "conversion": astuple(self._reports[name])}
        )

    def _write_small_files(
        self, shards: Mapping[str, FileRecord], conversion: Mapping[str, object] | None
    ) -> None:
        records = dict(shards)
        for name, source in self._program.copies.items():
            records[name] = FileRecord(*copy_file(source, self._fresh(name), self._ops))
        for name, content in self._program.texts.items():
            records[name] = FileRecord(len(content), xxhash.xxh3_128_hexdigest(content))
            write_file(self._fresh(name), content, self._ops)
        manifest = manifest_bytes(self._program, records, conversion)
        write_file(self._fresh(MANIFEST_NAME), manifest, self._ops)

    def _fresh(self, name: str) -> Path:
        """Where a small file goes, after removing what a run that was killed late left there."""
        path = self._staging.folder / name
        remove_leftover(path, self._ops)
        return path


def _conversion(reports: Iterable[EncodeReport]) -> dict[str, object] | None:
    """The summary of conversion to MXFP4 over all shards, None where nothing was converted.

    The error has six digits: more would differ with the instruction set that summed it.
    """
    total = EncodeReport.total(reports)
    if not total.blocks:
        return None
    return {
        "blocks": total.blocks,
        "inexact_blocks": total.inexact_blocks,
        "relative_error": float(f"{total.relative_error:.6g}"),
    }


def _placed_copies(shard: OutputShard) -> Iterator[tuple[Span, int]]:
    """Every copy of the shard with its file offset, neighbours in both files joined."""
    offset = len(shard.header)
    run: Span | None = None
    start = 0
    for part in (p for t in shard.tensors for p in t.parts):
        span = part.span if isinstance(part, Copy) else None
        if run and span and (run.shard, run.offset + run.nbytes) == (span.shard, span.offset):
            run = Span(run.shard, run.offset, run.nbytes + span.nbytes)
        else:
            if run:
                yield run, start
            run, start = span, offset
        offset += part.nbytes
    if run:
        yield run, start


def _gaps(chunk: Chunk, shared: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The parts of the chunk's file range that `shared`, sorted and disjoint, does not cover."""
    position, stop = chunk.offset, chunk.offset + chunk.nbytes
    for begin, end in shared:
        if end <= position:
            continue
        if begin >= stop:
            break
        if begin > position:
            yield position, begin
        position = max(position, end)
    if position < stop:
        yield position, stop
