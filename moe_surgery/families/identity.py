"""Identifies the model in a checkpoint, independently of its sharding."""

from __future__ import annotations

import xxhash

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.gguf.model_file import GgufModel
from moe_surgery.families.base import Role
from moe_surgery.families.model_spec import ModelSpec

__all__ = ["identity"]


def identity(checkpoint: Checkpoint | GgufModel, model: ModelSpec) -> str:
    """A digest (xxh3_128) over the names, dtypes and shapes of all tensors and the bytes of the routers.

    Routers are small and are what statistics and plans depend on: differently trained checkpoints
    differ there, while the same weights in other shards are the same model.
    """
    digest = xxhash.xxh3_128()
    for name, ref in sorted(checkpoint.tensors.items()):
        digest.update(repr((name, ref.dtype, ref.shape)).encode())
    for tensor in sorted(model.tensors, key=lambda t: t.name):
        if tensor.role is Role.ROUTER:
            ref = tensor.stored
            digest.update(checkpoint.shards[ref.shard].source.read(ref.offset, ref.nbytes))
    return digest.hexdigest()
