"""The producer of an output file: padding, and tables of expert numbers."""

from __future__ import annotations

from collections.abc import Mapping

from moe_surgery.checkpoint.shard import OpenFile
from moe_surgery.engine.chunks import PartSlice
from moe_surgery.engine.producer import Producer
from moe_surgery.formats.encode_report import EncodeReport
from moe_surgery.surgery.gguf.program import GgufOutputFile, Pad
from moe_surgery.surgery.routing_table import RoutingTables

__all__ = ["gguf_producer"]


def gguf_producer(file: GgufOutputFile, sources: Mapping[str, OpenFile]) -> Producer:
    """The producer of `file` from the source's files by name."""
    return Producer(file, sources, _Parts(sources))


class _Parts:
    """Fills what is not copied. `fill` may run in several threads, in any order."""

    def __init__(self, sources: Mapping[str, OpenFile]) -> None:
        self._tables = RoutingTables(sources)

    def report(self) -> EncodeReport:
        """Nothing is lost."""
        return EncodeReport()

    def fill(self, piece: PartSlice, target: memoryview) -> None:
        if isinstance(piece.part, Pad):
            target[:] = bytes(piece.nbytes)
        else:
            self._tables.fill(piece, target)
