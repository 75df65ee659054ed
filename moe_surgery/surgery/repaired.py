"""Small tensors with new values in place of the source's: what `repair` changes in a program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moe_surgery.engine.spans import Literal
from moe_surgery.errors import UsageError
from moe_surgery.families.base import Role
from moe_surgery.families.model_spec import ModelSpec
from moe_surgery.surgery.program import OutputShard, OutputTensor, Program

__all__ = ["REPAIRED_ROLES", "Repair", "with_repair"]

REPAIRED_ROLES = frozenset({Role.ROUTER, Role.EXPERT_BIAS, Role.NORM})
"""What may have been repaired: never a weight of an expert, of attention, or a vocabulary table."""


@dataclass(frozen=True, slots=True)
class Repair:
    """`tensors`: the new bytes of output tensors by name. `record` goes into the manifest: the texts and what the
    repair gained; JSON."""

    tensors: Mapping[str, bytes]
    record: Mapping[str, object] = field(default_factory=dict)


def with_repair(program: Program, model: ModelSpec, repair: Repair) -> Program:
    """`program` for `model` with the tensors of `repair`; dtypes and shapes stay.

    Raises UsageError for a tensor that the program does not have, that is not a router, a bias of an expert or a
    norm, or whose size differs.
    """
    roles = {tensor.name: tensor.role for tensor in model.tensors}
    known = {tensor.name for shard in program.shards for tensor in shard.tensors}
    for name in repair.tensors:
        if name not in known or roles.get(name) not in REPAIRED_ROLES:
            raise UsageError(f"`repair`: {name!r} is not a router, expert bias or norm of this model")
    shards = tuple(
        OutputShard(shard.name, shard.header, tuple(_repaired(t, repair.tensors) for t in shard.tensors))
        for shard in program.shards
    )
    return replace(program, shards=shards, repair={"tensors": sorted(repair.tensors), **repair.record})


def _repaired(tensor: OutputTensor, tensors: Mapping[str, bytes]) -> OutputTensor:
    content = tensors.get(tensor.name)
    if content is None:
        return tensor
    if len(content) != tensor.nbytes:
        raise UsageError(f"`repair`: {tensor.name!r} has {len(content)} bytes, expected {tensor.nbytes}")
    return replace(tensor, parts=(Literal(content),))
