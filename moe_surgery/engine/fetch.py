"""How many bytes of a checkpoint a run reads over a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.engine.chunks import FileLayout, parts_of

if TYPE_CHECKING:
    from moe_surgery.checkpoint.gguf.model_file import GgufModel

__all__ = ["Fetch", "OnFetch", "remote_shards", "to_fetch"]

Layout = TypeVar("Layout", bound=FileLayout)


@dataclass(frozen=True, slots=True)
class Fetch:
    """`nbytes` to be fetched from the model `name`, whose shards have `total` bytes."""

    name: str
    nbytes: int
    total: int


OnFetch = Callable[[Fetch], None]
"""Called before the first of them is fetched; not called where all bytes are on this machine."""


def remote_shards(checkpoint: Checkpoint | GgufModel) -> set[str]:
    """The shards that are read over a network."""
    return {name for name in checkpoint.shards if checkpoint.files.bytes_to_fetch(name)}


def to_fetch(
    layouts: Iterable[Layout],
    copies: Iterable[str],
    checkpoint: Checkpoint | GgufModel,
    begun: Callable[[Layout], int] = lambda _: 0,
) -> Fetch | None:
    """What writing `layouts` and copying the side files `copies` fetches; None where that is nothing.

    The first `begun` bytes of a layout are written already. Headers, which were read when the checkpoint was opened,
    are not counted.
    """
    files, remote = checkpoint.files, remote_shards(checkpoint)
    nbytes = sum(files.bytes_to_fetch(name) for name in copies)
    nbytes += sum(_bytes_read(layout, remote, begun(layout)) for layout in layouts)
    if not nbytes:
        return None
    return Fetch(str(files), nbytes, sum(shard.nbytes for shard in checkpoint.shards.values()))


def _bytes_read(layout: FileLayout, shards: set[str], start: int) -> int:
    """What is read of `shards` to write `layout` from file position `start` on."""
    nbytes = end = 0
    for _, part, count in parts_of(layout):
        end += count
        if part is not None and end > start:
            read = sum(span.nbytes for span in part.spans_read if span.shard in shards)
            nbytes += min(read, end - start) if read == count else read  # a copy is cut where it has to be
    return nbytes
