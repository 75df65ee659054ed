"""Tables of expert numbers (DeepSeek-V4's tid2eid), renumbered row by row."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Final

from moe_surgery.checkpoint.shard import OpenFile
from moe_surgery.engine.chunks import PartSlice
from moe_surgery.errors import InvalidInputError
from moe_surgery.formats.encode_report import EncodeReport
from moe_surgery.surgery.program import Remap

__all__ = ["RoutingTables", "remapped"]

TYPE_CODES: Final = {4: "i", 8: "q"}


def remapped(rows: array[int], part: Remap, where: str) -> array[int]:
    """`rows` in the numbers of the kept experts; whole rows.

    The replacement of a dropped expert e is the first kept one, counted cyclically from position e modulo their
    number, that is not in the row. Raises InvalidInputError for a number that is not of an expert.
    """
    new = {old: number for number, old in enumerate(part.kept)}
    count = len(part.kept)
    result = array(rows.typecode, rows)
    for start in range(0, len(rows), part.columns):
        row = rows[start : start + part.columns]
        numbers = [new.get(e, -1) for e in row]
        if -1 in numbers:
            used = set(numbers)
            for column, expert in enumerate(row):
                if numbers[column] >= 0:
                    continue
                if not 0 <= expert < part.experts:
                    raise InvalidInputError(
                        f"{where}: tensor {part.tensor!r} holds {expert}, which is not an expert of {part.experts}"
                    )
                candidate = expert % count
                while candidate in used:
                    candidate = (candidate + 1) % count
                numbers[column] = candidate
                used.add(candidate)
        result[start : start + part.columns] = array(rows.typecode, numbers)
    return result


class RoutingTables:
    """The `Remap` parts of an output shard. `fill` may run in several threads, in any order."""

    def __init__(self, sources: Mapping[str, OpenFile]) -> None:
        self._shards = sources

    def report(self) -> EncodeReport:
        """Nothing is lost."""
        return EncodeReport()

    def fill(self, piece: PartSlice, target: memoryview) -> None:
        """Write the bytes of a piece of a `Remap` part to `target`, of the rows that it touches."""
        part = piece.part
        assert isinstance(part, Remap)
        row = part.columns * part.itemsize
        begin = piece.start // row * row
        end = min(-(-(piece.start + piece.nbytes) // row) * row, part.nbytes)
        raw = bytearray(end - begin)
        shard = self._shards[part.values.shard]
        shard.read_into(part.values.offset + begin, memoryview(raw))
        values = array(TYPE_CODES[part.itemsize])
        values.frombytes(bytes(raw))
        out = remapped(values, part, shard.where).tobytes()
        target[:] = out[piece.start - begin : piece.start - begin + piece.nbytes]
