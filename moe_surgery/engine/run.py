"""Writes the files of an output folder and journals each when finished, so that a killed run can resume."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import astuple, dataclass
from typing import Final, Protocol, TypeVar

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.local_file import LocalFile
from moe_surgery.checkpoint.shard import OpenFile
from moe_surgery.checkpoint.staging import Staging
from moe_surgery.checkpoint.writer import OutputFile, remove_leftover
from moe_surgery.engine.chunks import Chunk, FileLayout
from moe_surgery.engine.digest import FileDigest, digest_file, digest_start
from moe_surgery.engine.output import OnBytes, publish, write_layout
from moe_surgery.engine.producer import Producer
from moe_surgery.engine.reflink import Range, share_extents
from moe_surgery.formats.encode_report import EncodeReport

__all__ = ["FETCHED_SEGMENT_BYTES", "FolderRun", "NamedLayout", "WrittenFile"]

FETCHED_SEGMENT_BYTES: Final = 256 << 20
"""How often the journal records an output file whose bytes are fetched: a kill loses at most this much of it."""


class NamedLayout(FileLayout, Protocol):
    """An output file with its name in the folder."""

    @property
    def name(self) -> str: ...


Layout = TypeVar("Layout", bound=NamedLayout)


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A finished file: xxh3_128 of the whole and of each tensor, and what conversion to MXFP4 lost."""

    digest: str
    tensors: tuple[str, ...]
    report: EncodeReport


class FolderRun:
    """Writes files to a `Staging` folder.

    `bytes_shared` counts reflinked bytes, `bytes_reserved` those of the disk that unfinished files of an earlier run
    take. `holds_earlier_work`: all that is there is of an earlier run that can be resumed.
    """

    def __init__(
        self,
        staging: Staging,
        sources: Mapping[str, OpenFile],
        ops: FileOps,
        progress: OnBytes,
        *,
        segment: int | None = None,
    ) -> None:
        """`segment`: flush and journal each file after this many bytes, a multiple of the chunk size, so that a file
        is resumed from there. Its bytes are then all written, none reflinked."""
        self.bytes_shared = self.bytes_reserved = 0
        self.holds_earlier_work = bool(staging.finished)
        self._staging = staging
        self._sources = sources
        self._ops = ops
        self._progress = progress
        self._reflink = segment is None
        self._segment = segment
        self._begun: dict[str, tuple[int, FileDigest]] = {}

    def begun(self, layout: NamedLayout) -> int:
        """How many bytes of `layout` an earlier run wrote that did not finish it; known after `resume`."""
        return self._begun[layout.name][0] if layout.name in self._begun else 0

    def resume(self, layouts: Iterable[NamedLayout]) -> dict[str, WrittenFile]:
        """The files that an earlier run finished and whose digest still matches.

        Other files with the name of a layout are removed, but for unfinished ones whose beginning still matches.
        """
        recorded = {str(e["name"]): e for e in self._staging.finished}
        finished: dict[str, WrittenFile] = {}
        for layout in layouts:
            path = self._staging.folder / layout.name
            entry = recorded.get(layout.name)
            if entry is not None and path.is_file():
                with LocalFile(path, self._ops) as file:
                    digest = digest_file(file, layout, self._progress)
                if digest is not None and digest.whole == entry["xxh3_128"]:
                    report = EncodeReport(*entry["conversion"])  # type: ignore[misc]
                    finished[layout.name] = WrittenFile(digest.whole, tuple(digest.tensors), report)
                    continue
            remove_leftover(path, self._ops)
            self._resume_within(layout, recorded)
        self.holds_earlier_work = bool(finished or self._begun)
        return finished

    def _resume_within(self, layout: NamedLayout, recorded: Mapping[str, Mapping[str, object]]) -> None:
        """Note how far an earlier run wrote `layout`; what cannot be used is removed."""
        temporary = OutputFile.temporary(self._staging.folder / layout.name)
        entry = recorded.get(temporary.name)
        if entry is not None and temporary.is_file():
            nbytes = entry["bytes"]
            assert isinstance(nbytes, int)
            with LocalFile(temporary, self._ops) as file:
                digest = digest_start(file, layout, nbytes, self._progress)
            if digest is not None and digest.whole == entry["xxh3_128"]:
                self._begun[layout.name] = nbytes, digest
                allocated = temporary.stat().st_blocks * 512
                self.bytes_reserved += max(nbytes, min(allocated, layout.nbytes))
                return
        remove_leftover(temporary, self._ops)

    def write(
        self, layouts: Iterable[Layout], producer_of: Callable[[Layout, Mapping[str, OpenFile]], Producer]
    ) -> dict[str, WrittenFile]:
        """Write the files in order; what is finished is flushed and journalled while the next bytes are written."""
        self.holds_earlier_work = False
        written: dict[str, WrittenFile] = {}
        with ThreadPoolExecutor(1, "flush") as flusher:
            flushing: Future[None] | None = None
            for layout in layouts:
                file, result = self._write(layout, producer_of(layout, self._sources), flusher)
                if flushing is not None:
                    try:
                        flushing.result()
                    except BaseException:
                        file.discard()
                        raise
                written[layout.name] = result
                flushing = flusher.submit(self._finish, layout.name, file, result)
            if flushing is not None:
                flushing.result()
        return written

    def _write(
        self, layout: NamedLayout, producer: Producer, flusher: ThreadPoolExecutor
    ) -> tuple[OutputFile, WrittenFile]:
        start, digest = self._begun.get(layout.name) or (0, FileDigest(len(layout.tensors)))
        file = OutputFile(self._staging.folder / layout.name, self._ops, resume=bool(start))
        digests: dict[int, str] = {}  # of the file up to a position
        flushing: list[Future[None]] = []
        try:
            shared: list[Range] = []
            if self._reflink:
                shared, self._reflink = share_extents(layout, file, self._sources)
                self.bytes_shared += sum(end - begin for begin, end in shared)

            def consume(chunk: Chunk, buffer: memoryview) -> None:
                digest.update(chunk, buffer)
                position = chunk.offset + chunk.nbytes
                if self._segment and position % self._segment == 0:
                    digests[position] = digest.whole
                self._progress(chunk.nbytes)

            def written(position: int) -> None:
                if position in digests:
                    for earlier in flushing:
                        if earlier.done():
                            earlier.result()
                    entry = {"bytes": position, "xxh3_128": digests.pop(position)}
                    flushing.append(flusher.submit(self._finish_segment, file, entry))

            write_layout(layout, producer, file, consume, shared=shared, start=start, written=written)
            for future in flushing:
                future.result()
        except BaseException:
            wait(flushing)
            if self._segment:
                file.close()  # what is journalled can be used by the next run
            else:
                file.discard()
            raise
        return file, WrittenFile(digest.whole, tuple(digest.tensors), producer.report())

    def _finish_segment(self, file: OutputFile, entry: Mapping[str, object]) -> None:
        file.flush()
        self._staging.record({"name": OutputFile.temporary(file.path).name, **entry})

    def _finish(self, name: str, file: OutputFile, result: WrittenFile) -> None:
        publish(file, self._ops)
        report = astuple(result.report)
        self._staging.record({"name": name, "xxh3_128": result.digest, "conversion": report})
