"""Compares a finished checkpoint with its source, byte for byte."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.header import Header, read_header
from moe_surgery.checkpoint.local_file import LocalFile
from moe_surgery.checkpoint.source import Folder
from moe_surgery.checkpoint.text import printable
from moe_surgery.engine.chunks import Chunk
from moe_surgery.engine.producer import produce
from moe_surgery.errors import PlanMismatchError, VerificationError
from moe_surgery.families import AnyFamily, ModelSpec, identify_model
from moe_surgery.surgery.compiler import compile_program
from moe_surgery.surgery.findings import Findings
from moe_surgery.surgery.manifest import Manifest
from moe_surgery.surgery.names import MANIFEST_NAME
from moe_surgery.surgery.producer import producer_of
from moe_surgery.surgery.program import OutputShard, OutputTensor
from moe_surgery.surgery.repaired import REPAIRED_ROLES

__all__ = ["compare_with_source"]


def compare_with_source(
    folder: Path,
    source: str | os.PathLike[str] | Folder,
    manifest: Manifest,
    families: tuple[AnyFamily, ...],
    findings: Findings,
) -> None:
    """Add to `findings` every tensor in `folder` that differs from the manifest's plan applied to `source`.

    Those that the manifest lists as repaired may differ, where a repair may change them.
    Raises PlanMismatchError where `source` is a model of another shape, and any error of opening it.
    """
    with Checkpoint.open(source) as checkpoint:
        model = identify_model(checkpoint, families)
        _check_shape(model, checkpoint, folder, manifest)
        _check_shards(checkpoint, manifest, findings)
        program = compile_program(checkpoint, model, manifest.plan, store=manifest.expert_format.name)
        tensors = {t.name: t for s in program.shards for t in s.tensors}
        repaired = _repaired(folder, model, manifest, findings)
        with Checkpoint.open(folder) as output:
            for name, shard in output.shards.items():
                header = read_header(shard.source)
                findings.attempt(
                    lambda n=name, h=header: _compare(folder / n, h, tensors, checkpoint, repaired, findings)  # type: ignore[misc]
                )
        checkpoint.check_unchanged()


def _check_shape(model: ModelSpec, checkpoint: Checkpoint, folder: Path, manifest: Manifest) -> None:
    plan = manifest.plan
    if not plan.fits(model.model_type, model.experts, model.layers):
        raise PlanMismatchError(
            f"{printable_path(checkpoint.path)}: not the source of {printable_path(folder)}: it is "
            f"{model.model_type} with {model.layers} layers of {model.experts} experts, the source is "
            f"{plan.model_type} with {plan.num_layers} layers of {plan.num_source_experts}"
        )


def _check_shards(checkpoint: Checkpoint, manifest: Manifest, findings: Findings) -> None:
    """A note where the source has other shards than the manifest names."""
    recorded = {str(s["name"]): s["header_digest"] for s in manifest.sources}
    actual = {n: s.header.digest for n, s in checkpoint.shards.items()}
    if recorded != actual:
        findings.notes.append(
            f"{printable_path(checkpoint.path)}: shards are laid out differently than in the source that "
            f"{MANIFEST_NAME} names; compared tensor by tensor"
        )


def _repaired(folder: Path, model: ModelSpec, manifest: Manifest, findings: Findings) -> frozenset[str]:
    """The tensors that may differ from the source, and a note on them; a problem for one that no repair changes."""
    names = manifest.repaired
    if not names:
        return frozenset()
    roles = {tensor.name: tensor.role for tensor in model.tensors}
    allowed = frozenset(n for n in names if roles.get(n) in REPAIRED_ROLES)
    for name in names:
        if name not in allowed:
            findings.problems.append(
                f"{printable_path(folder / MANIFEST_NAME)}: lists tensor '{printable(name)}' as repaired, which is no "
                "router, bias of experts or norm"
            )
    findings.notes.append(
        f"{printable_path(folder)}: {len(names)} repaired tensors (routers, biases of experts, norms) were compared "
        "with the manifest only, all others with the source as well"
    )
    return allowed


def _compare(
    path: Path,
    header: Header,
    tensors: Mapping[str, OutputTensor],
    source: Checkpoint,
    repaired: frozenset[str],
    findings: Findings,
) -> None:
    """Produce the shard again from the source and compare it with the bytes on disk."""
    for info in header.tensors.values():
        planned = tensors.get(info.name)
        if planned is None or (planned.dtype, planned.shape) != (info.dtype, info.shape):
            raise VerificationError(
                f"{printable_path(path)}: tensor '{printable(info.name)}' does not match the plan applied to "
                f"{printable_path(source.path)}"
            )
    expected = OutputShard(path.name, bytes(header.data_start), tuple(tensors[n] for n in header.tensors))
    producer = producer_of(expected, source.shards)
    different: dict[str, None] = {}

    def consume(chunk: Chunk, buffer: memoryview) -> None:
        actual = bytearray(len(buffer))
        file.read_into(chunk.offset, memoryview(actual))
        if actual != buffer:
            for piece in chunk.slices:
                if piece.tensor >= 0 and piece.of(memoryview(actual)) != piece.of(buffer):
                    different[expected.tensors[piece.tensor].name] = None
        findings.advance(len(buffer))

    with LocalFile(path) as file:
        produce(expected, producer, consume)
    for tensor in (name for name in different if name not in repaired):
        findings.problems.append(
            f"{printable_path(path)}: tensor '{printable(tensor)}': differs from the kept experts of "
            f"{printable_path(source.path)}"
        )
