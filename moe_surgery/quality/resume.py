"""Shared by long jobs: the model they run, digest of their inputs, context, checking outputs before the work."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import xxhash

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.source import Folder
from moe_surgery.errors import OutputError, UsageError
from moe_surgery.families import AnyFamily, Family, ModelSpec, identify_model
from moe_surgery.families.catalog_config import holders
from moe_surgery.families.identity import identity
from moe_surgery.families.model_config import ModelConfig
from moe_surgery.selection.arguments import PathLike

__all__ = [
    "CONTEXT",
    "check_writable",
    "default_context",
    "identify",
    "identify_runnable",
    "job_digest",
    "partial_path",
    "stamp_digest",
]

CONTEXT = 4096


def identify(checkpoint: PathLike | Folder, families: tuple[AnyFamily, ...]) -> tuple[ModelSpec, str]:
    """The model in `checkpoint`, of one of `families`, and its identity. Raises as `identify_model`."""
    with Checkpoint.open(checkpoint) as opened:
        spec = identify_model(opened, families)
        return spec, identity(opened, spec)


def identify_runnable(
    checkpoint: PathLike | Folder, families: tuple[AnyFamily, ...]
) -> tuple[ModelSpec, str]:
    """The model in `checkpoint`, of one of `families`, and its identity.

    Raises as `identify_model` and, where its family cannot be run, as `ModelSpec.described`.
    """
    spec, source_identity = identify(checkpoint, families)
    spec.require_description()
    return spec, source_identity


def stamp_digest(checkpoint: PathLike | Folder) -> str:
    """A digest of the stamps of the checkpoint's shards: of these very weights, where `identity` looks at routers."""
    with Checkpoint.open(checkpoint) as opened:
        return job_digest([repr(shard.source.stamp) for _, shard in sorted(opened.shards.items())])


def default_context(spec: ModelSpec, context: int | None) -> int:
    """Longest passage in tokens: `context` if given, else 4096 or the model's context.

    Raises UsageError for a context that the model does not support.
    """
    most = _longest(spec)
    if context is None:
        return min(most, CONTEXT)
    if not 1 <= context <= most:
        raise UsageError(f"`context` {context}: this model supports 1 to {most} tokens")
    return context


def _longest(spec: ModelSpec) -> int:
    """The model's context in tokens; `CONTEXT` where config.json does not say."""
    if isinstance(spec.family, Family):
        return ModelConfig.of(spec).max_position_embeddings
    found = [holder.get("max_position_embeddings") for _, holder in holders(spec.config)]
    return next((n for n in found if type(n) is int and n > 0), CONTEXT)


def partial_path(output: Path) -> Path:
    """The file with a job's progress towards `output`."""
    return output.with_name(f".{output.name}.partial")


def check_writable(*files: Path) -> None:
    """Raise OutputError before hours of work; removes half-written files of a killed run."""
    for file in files:
        if file.is_dir() or not file.parent.is_dir():
            reason = "is a folder" if file.is_dir() else "no such folder to write it into"
            raise OutputError(f"{printable_path(file)}: {reason}")
        with suppress(OSError):
            file.with_name(f".{file.name}.tmp").unlink()


def job_digest(value: object) -> str:
    """A digest of everything that determines a job's result, as JSON."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())
