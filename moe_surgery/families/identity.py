"""Identifies the model in a checkpoint, independently of its sharding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import xxhash

from moe_surgery.checkpoint.checkpoint import Checkpoint, TensorRef
from moe_surgery.families.base import Role
from moe_surgery.families.model_spec import ModelSpec

if TYPE_CHECKING:
    from moe_surgery.checkpoint.gguf.model_file import GgufModel, GgufTensor

__all__ = ["identity"]

AHEAD: Final = 16
"""Routers whose bytes are requested before they are needed, from a model on the hub."""


def identity(checkpoint: Checkpoint | GgufModel, model: ModelSpec) -> str:
    """A digest (xxh3_128) over the names, dtypes and shapes of all tensors and the bytes of the routers.

    Routers are small and are what statistics and plans depend on: differently trained checkpoints
    differ there, while the same weights in other shards are the same model.
    """
    digest = xxhash.xxh3_128()
    tensors: Mapping[str, TensorRef | GgufTensor] = checkpoint.tensors
    for name, ref in sorted(tensors.items()):
        digest.update(repr((name, ref.dtype, ref.shape)).encode())
    routers = [t.stored for t in sorted(model.tensors, key=lambda t: t.name) if t.role is Role.ROUTER]
    for number, ref in enumerate(routers):
        for soon in routers[number : number + AHEAD]:
            checkpoint.shards[soon.shard].source.expect([(soon.offset, soon.nbytes)])
        digest.update(checkpoint.shards[ref.shard].source.read(ref.offset, ref.nbytes))
    return digest.hexdigest()
