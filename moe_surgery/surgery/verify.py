"""Checks a checkpoint against its manifest, its config and, optionally, its source."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_surgery.checkpoint.additions import is_addition
from moe_surgery.checkpoint.checkpoint import CONFIG_NAME, INDEX_NAME, Checkpoint
from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.header import Header, read_header
from moe_surgery.checkpoint.local_file import LocalFile, LocalFolder
from moe_surgery.checkpoint.resolve import resolve
from moe_surgery.checkpoint.source import ByteSource, Folder
from moe_surgery.checkpoint.text import printable
from moe_surgery.engine.chunks import Chunk, chunks_of, plain_chunks
from moe_surgery.engine.digest import FileDigest, digest_chunks
from moe_surgery.engine.spans import Copy, Span
from moe_surgery.engine.stream import stream
from moe_surgery.errors import MoeSurgeryError, OutputError, PlanMismatchError, VerificationError
from moe_surgery.families import FAMILIES, AnyFamily, ModelSpec, identify_model
from moe_surgery.progress import Counter, OnProgress
from moe_surgery.surgery.compiler import compile_program
from moe_surgery.surgery.manifest import FileRecord, Manifest, load_manifest
from moe_surgery.surgery.names import MANIFEST_NAME
from moe_surgery.surgery.producer import producer_of
from moe_surgery.surgery.program import OutputShard, OutputTensor

__all__ = ["Verification", "verify_checkpoint"]

SHARD_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of `verify_checkpoint`. `problems` holds one line each, naming file and tensor.

    `notes` are not problems, such as files that the manifest does not list. `side_files` are the files
    next to the shards that were edited, damaged or removed; `weights_ok` is True if nothing else is wrong.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    files: int
    tensors: int
    bytes_read: int
    side_files: tuple[str, ...] = ()
    weights_ok: bool = True

    @property
    def ok(self) -> bool:
        return not self.problems


def verify_checkpoint(
    out: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | Folder | None = None,
    structure_only: bool = False,
    weights_only: bool = False,
    families: tuple[AnyFamily, ...] = FAMILIES,
    progress: OnProgress | None = None,
) -> Verification:
    """Check the checkpoint folder `out`; reports every problem, not only the first.

    Always: headers, index, and config against tensor shapes. Unless `structure_only`: the digest of
    every file and tensor against the manifest. With `source`: every output byte against the manifest's plan
    applied to the source. With `weights_only` an edited or missing file next to
    the shards (README.md, config.json, tokenizer) is a note, not a problem; config and index must still
    agree with the shards. Damage that the source had before the surgery cannot be detected. `families` are the model
    families to recognise; `progress` is called with each `Progress`, in bytes.

    Raises OutputError where `out` is not a folder, or has no manifest and `structure_only` is off,
    and any error of opening `source`.
    """
    folder = resolve(out)
    if not folder.is_dir():
        raise OutputError(f"{printable_path(folder)}: is a file; pass the folder of the checkpoint")
    reads = 0 if structure_only else 2 if source is not None else 1
    total = reads * sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file())
    counter = Counter(progress, "verify", total, "bytes")
    return _Verifier(folder, families, counter.advance).run(source, structure_only, weights_only)


class _Verifier:
    def __init__(
        self, folder: Path, families: tuple[AnyFamily, ...], progress: Callable[[int], None]
    ) -> None:
        self._folder = folder
        self._families = families
        self._progress = progress
        self._problems: list[str] = []
        self._notes: list[str] = []
        self._side_file_problems: dict[str, str] = {}  # file next to the shards -> problem
        self._bytes = 0
        self._ops = FileOps()
        self._tensors = 0

    def run(
        self, source: str | os.PathLike[str] | Folder | None, structure_only: bool, weights_only: bool
    ) -> Verification:
        manifest = self._manifest(needed=not structure_only or source is not None)
        self._structure()
        files = sum(LocalFolder(self._folder).listing().values())
        if manifest is not None:
            files = len(manifest.files)
            for name, record in manifest.files.items():
                if record.tensors or name.endswith(SHARD_SUFFIX):
                    self._attempt(lambda n=name, r=record: self._shard(n, r, structure_only))  # type: ignore[misc]
                else:
                    self._side_file(name, record, structure_only)
            self._unlisted(manifest)
        if source is not None and manifest is not None and not self._problems:
            self._compare_with_source(source, manifest)
        sound = not self._problems
        (self._notes if weights_only else self._problems).extend(
            line for line in self._side_file_problems.values() if line not in self._problems
        )
        return Verification(
            tuple(self._problems),
            tuple(self._notes),
            files,
            self._tensors,
            self._bytes,
            tuple(self._side_file_problems),
            sound,
        )

    def _attempt(self, check: Callable[[], None]) -> None:
        try:
            check()
        except MoeSurgeryError as error:
            if str(error) not in self._problems:
                self._problems.append(str(error))

    def _manifest(self, *, needed: bool) -> Manifest | None:
        path = self._folder / MANIFEST_NAME
        if not os.path.lexists(path):
            if needed:
                raise OutputError(
                    f"{printable_path(path)}: not found, so there are no digests to compare with; "
                    "`structure_only=True` checks a checkpoint without one"
                )
            return None
        try:
            return load_manifest(path)
        except MoeSurgeryError as error:
            self._problems.append(str(error))
            return None

    def _structure(self) -> None:
        def check() -> None:
            with Checkpoint.open(self._folder) as checkpoint:
                self._notes.extend(identify_model(checkpoint, self._families).notes)
                self._tensors = len(checkpoint.tensors)

        self._attempt(check)

    def _shard(self, name: str, record: FileRecord, structure_only: bool) -> None:
        path = self._folder / name
        with LocalFile(path, self._ops) as file:
            if file.size != record.size:
                self._problems.append(f"{file.where}: {file.size} bytes, expected {record.size}")
                return
            header = self._header(file)
            if header is not None:
                self._compare_header(path, header, record)
            if not structure_only:
                self._digests(file, name, record, header)

    def _side_file(self, name: str, record: FileRecord, structure_only: bool) -> None:
        path = self._folder / name
        edited = f"{printable_path(path)}: edited or damaged since it was written"
        try:
            with LocalFile(path, self._ops) as file:
                if file.size != record.size:
                    self._side_file_problems[name] = f"{edited}: {file.size} bytes, expected {record.size}"
                elif not structure_only and self._file_digest(file) != record.xxh3_128:
                    self._side_file_problems[name] = f"{edited}: its digest does not match the manifest"
        except MoeSurgeryError as error:
            self._side_file_problems[name] = str(error)

    def _file_digest(self, file: ByteSource) -> str:
        """The digest of a file."""
        return digest_chunks(file, plain_chunks(file.size), FileDigest(), self._advance).whole

    def _advance(self, nbytes: int) -> None:
        self._bytes += nbytes
        self._progress(nbytes)

    def _header(self, file: ByteSource) -> Header | None:
        """The file's header, or None where it is damaged (which is reported)."""
        try:
            return read_header(file)
        except MoeSurgeryError as error:
            if str(error) not in self._problems:
                self._problems.append(str(error))
            return None

    def _compare_header(self, path: Path, header: Header, record: FileRecord) -> None:
        actual = {n: (i.dtype, i.shape) for n, i in header.tensors.items()}
        listed = {n: (t.dtype, t.shape) for n, t in record.tensors.items()}
        for name in sorted(actual.keys() | listed.keys()):
            if actual.get(name) != listed.get(name):
                self._problems.append(
                    f"{printable_path(path)}: tensor '{printable(name)}' is {_type_of(actual.get(name))} in the "
                    f"header, {_type_of(listed.get(name))} in {MANIFEST_NAME}"
                )

    def _digests(self, file: ByteSource, name: str, record: FileRecord, header: Header | None) -> None:
        """One pass over the file: its digest and, if the header can be read, those of its tensors."""
        if header is None:
            digest = digest_chunks(file, plain_chunks(file.size), FileDigest(), self._advance)
        else:
            shard = as_shard(name, header)
            digest = digest_chunks(file, chunks_of(shard), FileDigest(len(shard.tensors)), self._advance)
        digests = dict(zip(header.tensors if header else (), digest.tensors, strict=True))
        damaged = [n for n, t in record.tensors.items() if n in digests and digests[n] != t.xxh3_128]
        for name in damaged:
            self._problems.append(
                f"{file.where}: tensor '{printable(name)}': its digest does not match the manifest"
            )
        if digest.whole != record.xxh3_128 and not damaged:
            self._problems.append(f"{file.where}: its header was modified")

    def _unlisted(self, manifest: Manifest) -> None:
        listed = {*manifest.files, MANIFEST_NAME}
        hidden = []
        for name in sorted(LocalFolder(self._folder).listing()):
            if name in listed:
                continue
            if name.startswith("."):
                hidden.append(printable(name))
                continue
            line = f"{printable_path(self._folder / name)}: not listed in {MANIFEST_NAME}"
            shard = name.endswith(SHARD_SUFFIX) and not is_addition(name)
            is_problem = shard or name in (CONFIG_NAME, INDEX_NAME)
            (self._problems if is_problem else self._notes).append(line)
        if hidden:  # .gitattributes, .git, .cache and the like
            self._notes.append(
                f"{printable_path(self._folder)}: {', '.join(hidden)}: hidden files, not part of the checkpoint"
            )

    def _compare_with_source(self, source: str | os.PathLike[str] | Folder, manifest: Manifest) -> None:
        with Checkpoint.open(source) as checkpoint:
            model = identify_model(checkpoint, self._families)
            self._check_shape(model, checkpoint, manifest)
            self._same_source(checkpoint, manifest)
            program = compile_program(checkpoint, model, manifest.plan, store=manifest.expert_format.name)
            tensors = {t.name: t for s in program.shards for t in s.tensors}
            with Checkpoint.open(self._folder) as output:
                for name, shard in output.shards.items():
                    header = read_header(shard.source)
                    self._attempt(lambda n=name, h=header: self._compare(n, h, tensors, checkpoint))  # type: ignore[misc]
            checkpoint.check_unchanged()

    def _check_shape(self, model: ModelSpec, checkpoint: Checkpoint, manifest: Manifest) -> None:
        plan = manifest.plan
        if not plan.fits(model.model_type, model.experts, model.layers):
            raise PlanMismatchError(
                f"{printable_path(checkpoint.path)}: not the source of {printable_path(self._folder)}: it is "
                f"{model.model_type} with {model.layers} layers of {model.experts} experts, the source is "
                f"{plan.model_type} with {plan.num_layers} layers of {plan.num_source_experts}"
            )

    def _same_source(self, checkpoint: Checkpoint, manifest: Manifest) -> None:
        recorded = {str(s["name"]): s["header_digest"] for s in manifest.sources}
        actual = {n: s.header.digest for n, s in checkpoint.shards.items()}
        if recorded != actual:
            self._notes.append(
                f"{printable_path(checkpoint.path)}: shards are laid out differently than in the source that "
                f"{MANIFEST_NAME} names; compared tensor by tensor"
            )

    def _compare(
        self, name: str, header: Header, tensors: Mapping[str, OutputTensor], source: Checkpoint
    ) -> None:
        """Produce the shard again from the source and compare it with the bytes on disk."""
        path = self._folder / name
        for info in header.tensors.values():
            planned = tensors.get(info.name)
            if planned is None or (planned.dtype, planned.shape) != (info.dtype, info.shape):
                raise VerificationError(
                    f"{printable_path(path)}: tensor '{printable(info.name)}' does not match the plan applied to "
                    f"{printable_path(source.path)}"
                )
        expected = OutputShard(name, bytes(header.data_start), tuple(tensors[n] for n in header.tensors))
        producer = producer_of(expected, source.shards)
        different: dict[str, None] = {}

        def consume(chunk: Chunk, buffer: memoryview) -> None:
            actual = bytearray(len(buffer))
            file.read_into(chunk.offset, memoryview(actual))
            if actual != buffer:
                for piece in chunk.slices:
                    if piece.tensor >= 0 and piece.of(memoryview(actual)) != piece.of(buffer):
                        different[expected.tensors[piece.tensor].name] = None
            self._advance(len(buffer))

        with LocalFile(path, self._ops) as file:
            stream(chunks_of(expected), producer.fill, consume)
        for tensor in different:
            self._problems.append(
                f"{printable_path(path)}: tensor '{printable(tensor)}': differs from the kept experts of "
                f"{printable_path(source.path)}"
            )


def as_shard(name: str, header: Header) -> OutputShard:
    """An existing file as a shard that copies itself."""
    start = header.data_start
    tensors = tuple(
        OutputTensor(i.name, i.dtype, i.shape, (Copy(Span(name, start + i.begin, i.nbytes)),))
        for i in header.tensors.values()
    )
    return OutputShard(name, bytes(start), tensors)


def _type_of(info: tuple[str, tuple[int, ...]] | None) -> str:
    return "absent" if info is None else f"{info[0]} {list(info[1])}"
