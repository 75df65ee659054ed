"""Checks a checkpoint against its manifest, its config and, optionally, its source."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from moe_surgery.checkpoint.additions import is_addition
from moe_surgery.checkpoint.checkpoint import CONFIG_NAME, INDEX_NAME, Checkpoint
from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.gguf.resolve import is_gguf
from moe_surgery.checkpoint.header import Header, read_header
from moe_surgery.checkpoint.local_file import LocalFile, LocalFolder
from moe_surgery.checkpoint.resolve import resolve
from moe_surgery.checkpoint.source import ByteSource, Folder
from moe_surgery.checkpoint.text import printable
from moe_surgery.engine.chunks import chunks_of_sizes, plain_chunks
from moe_surgery.engine.digest import FileDigest, digest_chunks
from moe_surgery.errors import MoeSurgeryError, OutputError, UsageError
from moe_surgery.families import FAMILIES, AnyFamily, identify_model
from moe_surgery.progress import Counter, OnProgress
from moe_surgery.surgery.findings import Findings
from moe_surgery.surgery.manifest import FileRecord, Manifest, load_manifest
from moe_surgery.surgery.names import MANIFEST_NAME

__all__ = ["Verification", "verify_checkpoint"]

SHARD_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of `verify_checkpoint`. `problems` holds one line each, naming file and tensor.

    `notes` are not problems, such as files that the manifest does not list. `side_files` are the files
    next to the shards that were edited, damaged or removed; `weights_ok` is True if nothing else is wrong.
    `repaired` are the tensors that the manifest lists as repaired: unlike all others they differ from the source.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    files: int
    tensors: int
    bytes_read: int
    side_files: tuple[str, ...] = ()
    weights_ok: bool = True
    repaired: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems


def verify_checkpoint(
    out: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | Folder | None = None,
    adapter: str | os.PathLike[str] | Folder | None = None,
    structure_only: bool = False,
    weights_only: bool = False,
    checked: Mapping[Hashable, FileRecord] | None = None,
    families: tuple[AnyFamily, ...] = FAMILIES,
    progress: OnProgress | None = None,
) -> Verification:
    """Check the checkpoint folder `out`; reports every problem, not only the first.

    Always: headers, index, and config against tensor shapes. Unless `structure_only`: the digest of
    every file and tensor against the manifest. With `source`: every output byte against the manifest's plan
    applied to the source, apart from tensors that were repaired; `adapter` is the one that was merged into it, without
    which a note says how many tensors the merge changed. With `weights_only` an edited or missing file next to
    the shards (README.md, config.json, tokenizer) is a note, not a problem; config and index must still
    agree with the shards. `checked` are files whose digests were just found to be those of the record: one that is
    also in this checkpoint (a hard link) is not read again. Damage that the source had before the surgery cannot be
    detected. `families` are the model families to recognise. `progress` is called with each `Progress`, in bytes.
    `out` may be a GGUF file; see `gguf.verify.verify_gguf`.

    Raises OutputError where `out` is not a folder, or has no manifest and `structure_only` is off,
    UsageError for an `adapter` without a `source`, and any error of opening them.
    """
    if adapter is not None and source is None:
        raise UsageError("`adapter` needs `source`: the checkpoint that it was merged into")
    if is_gguf(out):
        from moe_surgery.surgery.gguf.verify import verify_gguf

        if isinstance(source, Folder):
            raise UsageError("`source` of a GGUF file must be one too, not a folder")
        if adapter is not None:
            raise UsageError(
                "`adapter`: adapters are merged into folders of safetensors, not into GGUF files"
            )
        return verify_gguf(out, source=source, structure_only=structure_only, progress=progress)
    folder = resolve(out)
    if not folder.is_dir():
        raise OutputError(f"{printable_path(folder)}: is a file; pass the folder of the checkpoint")
    reads = 0 if structure_only else 2 if source is not None else 1
    total = reads * sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file())
    counter = Counter(progress, "verify", total, "bytes")
    return _Verifier(folder, families, counter.advance, checked or {}).run(
        source, adapter, structure_only, weights_only
    )


class _Verifier:
    def __init__(
        self,
        folder: Path,
        families: tuple[AnyFamily, ...],
        progress: Callable[[int], None],
        checked: Mapping[Hashable, FileRecord],
    ) -> None:
        self._folder = folder
        self._families = families
        self._findings = Findings(progress)
        self._side_file_problems: dict[str, str] = {}  # file next to the shards -> problem
        self._checked = checked
        self._ops = FileOps()
        self._tensors = 0

    def run(
        self,
        source: str | os.PathLike[str] | Folder | None,
        adapter: str | os.PathLike[str] | Folder | None,
        structure_only: bool,
        weights_only: bool,
    ) -> Verification:
        manifest = self._manifest(needed=not structure_only or source is not None)
        self._structure()
        files = sum(LocalFolder(self._folder).listing().values())
        if manifest is not None:
            files = len(manifest.files)
            for name, record in manifest.files.items():
                if record.tensors or name.endswith(SHARD_SUFFIX):
                    self._findings.attempt(lambda n=name, r=record: self._shard(n, r, structure_only))  # type: ignore[misc]
                else:
                    self._side_file(name, record, structure_only)
            self._unlisted(manifest)
        if source is not None and manifest is not None and not self._findings.problems:
            from moe_surgery.surgery.comparison import compare_with_source

            manifest = replace(manifest, files={})  # as large as two headers, and no longer needed
            compare_with_source(
                self._folder, source, manifest, self._families, self._findings, adapter=adapter
            )
        sound = not self._findings.problems
        (self._findings.notes if weights_only else self._findings.problems).extend(
            line for line in self._side_file_problems.values() if line not in self._findings.problems
        )
        return Verification(
            tuple(self._findings.problems),
            tuple(self._findings.notes),
            files,
            self._tensors,
            self._findings.bytes_read,
            tuple(self._side_file_problems),
            sound,
            manifest.repaired if manifest else (),
        )

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
            self._findings.problems.append(str(error))
            return None

    def _structure(self) -> None:
        def check() -> None:
            with Checkpoint.open(self._folder) as checkpoint:
                self._findings.notes.extend(identify_model(checkpoint, self._families).notes)
                self._tensors = len(checkpoint.tensors)

        self._findings.attempt(check)

    def _shard(self, name: str, record: FileRecord, structure_only: bool) -> None:
        path = self._folder / name
        with LocalFile(path, self._ops) as file:
            if file.size != record.size:
                self._findings.problems.append(f"{file.where}: {file.size} bytes, expected {record.size}")
                return
            header = self._header(file)
            if header is not None:
                self._compare_header(path, header, record)
            if structure_only:
                return
            if self._checked.get(file.stamp) == record:
                self._findings.advance(file.size)
            else:
                self._digests(file, record, header)

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
        return digest_chunks(file, plain_chunks(file.size), FileDigest(), self._findings.advance).whole

    def _header(self, file: ByteSource) -> Header | None:
        """The file's header, or None where it is damaged (which is reported)."""
        try:
            return read_header(file)
        except MoeSurgeryError as error:
            self._findings.failed(error)
            return None

    def _compare_header(self, path: Path, header: Header, record: FileRecord) -> None:
        actual = {n: (i.dtype, i.shape) for n, i in header.tensors.items()}
        listed = {n: (t.dtype, t.shape) for n, t in record.tensors.items()}
        for name in sorted(actual.keys() | listed.keys()):
            if actual.get(name) != listed.get(name):
                self._findings.problems.append(
                    f"{printable_path(path)}: tensor '{printable(name)}' is {_type_of(actual.get(name))} in the "
                    f"header, {_type_of(listed.get(name))} in {MANIFEST_NAME}"
                )

    def _digests(self, file: ByteSource, record: FileRecord, header: Header | None) -> None:
        """One pass over the file: its digest and, if the header can be read, those of its tensors."""
        if header is None:
            digest = digest_chunks(file, plain_chunks(file.size), FileDigest(), self._findings.advance)
        else:
            chunks = chunks_of_sizes(header.data_start, (i.nbytes for i in header.tensors.values()))
            digest = digest_chunks(file, chunks, FileDigest(len(header.tensors)), self._findings.advance)
        digests = dict(zip(header.tensors if header else (), digest.tensors, strict=True))
        damaged = [n for n, t in record.tensors.items() if n in digests and digests[n] != t.xxh3_128]
        for name in damaged:
            self._findings.problems.append(
                f"{file.where}: tensor '{printable(name)}': its digest does not match the manifest"
            )
        if digest.whole != record.xxh3_128 and not damaged:
            self._findings.problems.append(f"{file.where}: its header was modified")

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
            (self._findings.problems if is_problem else self._findings.notes).append(line)
        if hidden:  # .gitattributes, .git, .cache and the like
            self._findings.notes.append(
                f"{printable_path(self._folder)}: {', '.join(hidden)}: hidden files, not part of the checkpoint"
            )


def _type_of(info: tuple[str, tuple[int, ...]] | None) -> str:
    return "absent" if info is None else f"{info[0]} {list(info[1])}"
