"""How many bytes of a checkpoint a run reads over a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.engine.chunks import FileLayout

if TYPE_CHECKING:
    from moe_surgery.checkpoint.gguf.model_file import GgufModel

__all__ = ["Fetch", "OnFetch", "to_fetch"]


@dataclass(frozen=True, slots=True)
class Fetch:
    """`nbytes` to be fetched from the model `name`, whose shards have `total` bytes."""

    name: str
    nbytes: int
    total: int


OnFetch = Callable[[Fetch], None]
"""Called before the first of them is fetched; not called where all bytes are on this machine."""


def to_fetch(
    layouts: Iterable[FileLayout], copies: Iterable[str], checkpoint: Checkpoint | GgufModel
) -> Fetch | None:
    """What writing `layouts` and copying the side files `copies` fetches; None where that is nothing.

    Headers, which were read when the checkpoint was opened, are not counted.
    """
    files = checkpoint.files
    remote = {name for name in checkpoint.shards if files.bytes_to_fetch(name)}
    nbytes = sum(files.bytes_to_fetch(name) for name in copies)
    for part in (part for layout in layouts for tensor in layout.tensors for part in tensor.parts):
        nbytes += sum(span.nbytes for span in part.spans_read if span.shard in remote)
    if not nbytes:
        return None
    return Fetch(str(files), nbytes, sum(shard.nbytes for shard in checkpoint.shards.values()))
