"""Checks a pruned GGUF file: its structure, its manifest if it has one, and its source if that is given."""

from __future__ import annotations

import os
from pathlib import Path

from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.gguf.model_file import GgufModel, GgufShard
from moe_surgery.checkpoint.gguf.resolve import open_gguf
from moe_surgery.checkpoint.gguf.writer import padding
from moe_surgery.checkpoint.text import printable
from moe_surgery.engine.chunks import chunks_of_sizes, plain_chunks
from moe_surgery.engine.digest import FileDigest, digest_chunks
from moe_surgery.errors import InvalidInputError
from moe_surgery.families.gguf import identify_gguf
from moe_surgery.families.model_spec import ModelSpec
from moe_surgery.progress import Counter, OnProgress
from moe_surgery.surgery.findings import Findings
from moe_surgery.surgery.gguf.comparison import compare_with_source
from moe_surgery.surgery.gguf.metadata import KEPT_KEY
from moe_surgery.surgery.gguf.own_keys import own_keys
from moe_surgery.surgery.gguf.run import MANIFEST_SUFFIX
from moe_surgery.surgery.manifest import FileRecord, load_manifest
from moe_surgery.surgery.verify import Verification

__all__ = ["verify_gguf"]


def verify_gguf(
    out: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    structure_only: bool = False,
    progress: OnProgress | None = None,
) -> Verification:
    """Check the GGUF file `out`, the first of its set; reports every problem, not only the first.

    Always: its structure, and that tensors, counts and the experts it says it kept agree. Unless `structure_only`:
    the digest of every file and tensor against the manifest beside it, if there is one. With `source`: every tensor
    and key against the source's. Without either a changed weight is not found, which a note says.
    `progress` is called with each `Progress`, in bytes.

    Raises InvalidInputError or OutputError where `out` cannot be opened, PlanMismatchError where `source` is another
    model, and any error of opening it.
    """
    with open_gguf(out) as model:
        described = model.files.path / (model.name + MANIFEST_SUFFIX)
        listed = described.is_file() and not structure_only
        total = model.nbytes * (listed + (source is not None))
        findings = Findings(Counter(progress, "verify", total, "bytes").advance)
        spec: ModelSpec | None = None
        try:
            spec = identify_gguf(model)
            _check_own_keys(model, spec, findings)
        except InvalidInputError as error:
            findings.failed(error)
        if listed:
            findings.attempt(lambda: _check_digests(model, described, findings))
        if source is not None and spec is not None and not findings.problems:
            compare_with_source(model, spec, source, findings)
        if not listed and source is None:
            findings.notes.append(_unchecked(model, described, structure_only))
        return Verification(
            tuple(findings.problems),
            tuple(findings.notes),
            len(model.shards),
            len(model.tensors),
            findings.bytes_read,
            (),
            not findings.problems,
        )


def _check_own_keys(model: GgufModel, spec: ModelSpec, findings: Findings) -> None:
    kept = own_keys(model)
    if kept is None:
        findings.notes.append(
            f"{printable_path(model.path)}: was not pruned by moe-surgery (no key '{KEPT_KEY}'); compared as a whole"
        )
        return
    blocks = {*spec.layer_numbers, *(int(name.removeprefix("blk.")) for name in spec.mtp_layers)}
    if set(kept.rows) != blocks or any(len(row) != spec.experts for row in kept.rows.values()):
        findings.problems.append(
            f"{printable_path(model.path)}: key '{KEPT_KEY}' lists other experts than the {spec.experts} that each of "
            f"{len(blocks)} blocks has"
        )


def _check_digests(model: GgufModel, path: Path, findings: Findings) -> None:
    manifest = load_manifest(path)
    for name in sorted({*manifest.files, *model.shards}):
        record, shard = manifest.files.get(name), model.shards.get(name)
        where = printable_path(model.files.path / name)
        if record is None or shard is None:
            findings.problems.append(
                f"{where}: {'not listed in' if record is None else 'missing, but listed in'} {path.name}"
            )
        elif shard.nbytes != record.size:
            findings.problems.append(f"{where}: {shard.nbytes} bytes, expected {record.size}")
        else:
            _check_file(shard, record, model.alignment, findings)


def _check_file(shard: GgufShard, record: FileRecord, alignment: int, findings: Findings) -> None:
    infos = list(shard.header.tensors.values())
    sizes = [info.nbytes + padding(info.nbytes, alignment) for info in infos]
    laid_out = shard.header.data_start + sum(sizes) == shard.nbytes
    chunks = chunks_of_sizes(shard.header.data_start, sizes) if laid_out else plain_chunks(shard.nbytes)
    digest = digest_chunks(shard.source, chunks, FileDigest(len(infos)), findings.advance)
    damaged = []
    for info, actual in zip(infos, digest.tensors, strict=True):
        expected = record.tensors.get(info.name)
        if laid_out and (expected is None or expected.xxh3_128 != actual):
            damaged.append(info.name)
    for name in damaged:
        findings.problems.append(
            f"{shard.where}: tensor '{printable(name)}': its digest does not match the manifest"
        )
    if digest.whole != record.xxh3_128 and not damaged:
        findings.problems.append(f"{shard.where}: its metadata or tensor table was modified")


def _unchecked(model: GgufModel, described: Path, structure_only: bool) -> str:
    text = f"{printable_path(model.path)}: its structure was checked, its weights were not"
    if structure_only:
        return text
    return f"{text}: there is no {printable(described.name)} with digests; pass `source` to compare with the source"
