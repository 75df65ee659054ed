"""Adds low-rank updates to weights, in bounded pieces of one weight.

As PEFT merges in float32: the product of the factors is rounded to float32 (here from float64, so that it does not
depend on the order of summation), times the scale, plus the stored value, each rounded to float32; the sum is then
rounded once to the output's format.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from moe_surgery.checkpoint.shard import OpenFile
from moe_surgery.engine.chunks import PartSlice
from moe_surgery.engine.mapped_regions import MappedRegions
from moe_surgery.engine.spans import Span
from moe_surgery.errors import InvalidInputError
from moe_surgery.formats import convert, mxfp4
from moe_surgery.formats.encode_report import EncodeReport
from moe_surgery.formats.expert_format import BF16, F32, ExpertFormat
from moe_surgery.surgery.conversions import Conversions, strips
from moe_surgery.surgery.encoded_scales import EncodedScales
from moe_surgery.surgery.program import AddLowRank, Factor

__all__ = ["MergedWeights"]

GROUP: Final = mxfp4.BLOCK_VALUES
STRIP_VALUES: Final = 1 << 18
"""Values merged at a time, which bounds temporary memory: 20 bytes each."""

TILE_LINES: Final = 64
TILE_PRODUCTS: Final = 1 << 18
"""Multiplications of a tile of the product: OpenBLAS computes up to this many on one thread."""

Rows = NDArray[np.float32]


class MergedWeights:
    """The merged and converted parts of one output shard. `fill` may run in several threads, in any order."""

    def __init__(self, sources: Mapping[str, OpenFile]) -> None:
        self._shards = sources
        self._conversions = Conversions(sources)
        self._regions = MappedRegions(sources)
        self._lock = threading.Lock()
        self._scales = EncodedScales()
        self._reports: list[EncodeReport] = []

    def report(self) -> EncodeReport:
        """What conversion to MXFP4 lost."""
        with self._lock:
            return EncodeReport.total([*self._reports, self._conversions.report()])

    def fill(self, piece: PartSlice, target: memoryview) -> None:
        """Write the bytes of a piece of an AddLowRank, Decode, Cast or Encode part to `target`."""
        part = piece.part
        if not isinstance(part, AddLowRank):
            self._conversions.fill(piece, target)
            return
        out = np.frombuffer(target, np.uint8)
        if part.holds_scales:
            self._scales.consume(part, piece.start, out, partial(self._encode_scales, part))
        elif part.target.packed:
            self._encode(part, piece.start, out)
        else:
            self._dense(part, piece.start, out)

    def _dense(self, part: AddLowRank, start: int, out: NDArray[np.uint8]) -> None:
        """Bytes [start, start + len(out)) of a dense weight as stored, line by line."""
        width = part.rows if part.transposed else part.columns
        line = part.target.nbytes(width)
        with self._stored(part, start // line, -(-(start + len(out)) // line), part.transposed) as stored:
            for first, last, skip, target in strips(start, out, line):
                for begin, end in _runs(first, last, width):
                    merged, _ = self._merged(part, stored, begin, end, part.transposed)
                    values = self._in_format(merged, part).reshape(-1).view(np.uint8)
                    if skip is None:
                        target[(begin - first) * line : (end - first) * line] = values
                    else:
                        target[:] = values[skip : skip + len(target)]

    def _in_format(self, merged: Rows, part: AddLowRank) -> convert.Words:
        try:
            return convert.cast(np.ascontiguousarray(merged).view(np.uint32), F32, part.target)
        except InvalidInputError as error:
            raise InvalidInputError(f"{self._where(part)}: with the adapter merged, {error}") from None

    def _encode(self, part: AddLowRank, start: int, out: NDArray[np.uint8]) -> None:
        """Bytes [start, start + len(out)) of the blocks, row by row; the rows' scales are kept for later.

        A row that two chunks share is merged in both and counted in the first.
        """
        groups = part.columns // GROUP
        row = groups * mxfp4.BLOCK_BYTES
        begins = -(-start // row), -(-(start + len(out)) // row)  # the rows that begin here
        rows = start // row, begins[1]
        with self._scales.claim(part, *begins), self._stored(part, *rows, False) as stored:
            for first, last, skip, target in strips(start, out, row):
                for begin, end in _runs(first, last, part.columns):
                    blocks, scales, report = self._encoded(part, stored, begin, end)
                    packed = blocks.reshape(-1)
                    if skip is None:
                        target[(begin - first) * row : (end - first) * row] = packed
                    else:
                        target[:] = packed[skip : skip + len(target)]
                    if not skip:
                        self._scales.put(part, begin, scales)
                        with self._lock:
                            self._reports.append(report)

    def _encode_scales(self, part: AddLowRank, first: int, last: int) -> None:
        """Compute the scales of rows [first, last). The loss is counted with the blocks."""
        with self._scales.claim(part, first, last), self._stored(part, first, last, False) as stored:
            for begin, end in _runs(first, last, part.columns):
                self._scales.put(part, begin, self._encoded(part, stored, begin, end)[1])

    def _encoded(
        self, part: AddLowRank, stored: Stored, first: int, last: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8], EncodeReport]:
        """Blocks, scales and loss of rows [first, last)."""
        merged, update_sq = self._merged(part, stored, first, last, False)
        groups = part.columns // GROUP
        blocks = np.empty((last - first, groups, mxfp4.BLOCK_BYTES), np.uint8)
        scales = np.empty((last - first, groups), np.uint8)
        try:
            values = np.ascontiguousarray(merged.T).view(np.uint32)
            if not np.isfinite(merged).all():
                report = convert.encode_transposed(values, F32, blocks, scales)
                return blocks, scales, replace(report, update_sq=update_sq)
            report = mxfp4.encode_transposed(convert.round_to_odd(values, F32), blocks, scales)[2]
        except InvalidInputError as error:
            raise InvalidInputError(
                f"{self._where(part)}: with the adapter merged, rows from {first}: {error}"
            ) from None
        norm_sq = _sum_of_squares(merged)
        merged -= convert.cast(mxfp4.decode(blocks, scales), BF16, F32).view(np.float32)
        error_sq = _sum_of_squares(merged)
        return (
            blocks,
            scales,
            EncodeReport(report.blocks, report.inexact_blocks, error_sq, norm_sq, update_sq),
        )

    def _merged(
        self, part: AddLowRank, stored: Stored, first: int, last: int, across: bool
    ) -> tuple[Rows, float]:
        """Rows [first, last) of the merged weight, or of its transpose where `across`; and the sum of squares of
        what was added."""
        lines = slice(first, last)
        rows, columns = (slice(0, part.rows), lines) if across else (lines, slice(0, part.columns))
        up, down, scale = self._factors(part, rows, columns)
        with np.errstate(invalid="ignore", over="ignore"):
            added = _product(down.T, up.T) if across else _product(up, down)
            added *= scale if across else scale[:, None]
        if not np.isfinite(added).all():
            raise InvalidInputError(f"{self._where(part)}: the adapter's update holds NaN or infinity")
        update_sq = _sum_of_squares(added) if part.target.packed else 0.0
        added += stored.lines(first, last)
        return added, update_sq

    def _factors(
        self, part: AddLowRank, rows: slice, columns: slice
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], Rows]:
        """up [rows, rank], down [rank, columns] of all updates together, and the scale of each row."""
        count, rank = rows.stop - rows.start, sum(u.rank for u in part.updates)
        up, scale = np.zeros((count, rank)), np.zeros(count, np.float32)
        down = np.ones((rank, columns.stop - columns.start))
        begin = 0
        for update in part.updates:
            end = begin + update.rank
            first = max(0, -(-(rows.start - update.first) // update.step))
            last = min(update.up.used_rows, -(-(rows.stop - update.first) // update.step))
            if first < last:
                place = slice(
                    update.first + first * update.step - rows.start,
                    update.first + (last - 1) * update.step - rows.start + 1,
                    update.step,
                )
                up[place, begin:end] = self._values(update.up, slice(first, last), slice(None))
                scale[place] = update.scale
            if update.down is not None:
                down[begin:end] = self._values(update.down, slice(None), columns)
            begin = end
        return up, down, scale

    def _values(self, factor: Factor, rows: slice, columns: slice) -> NDArray[np.float64]:
        """Part of a factor; `rows` are those used."""
        with self._regions.open(factor.span) as raw:
            words = convert.words_of(raw, factor.stored_as)
            size = words.itemsize
            last = (factor.rows - 1) * factor.row_step + (factor.columns - 1) * factor.column_step
            assert factor.start + last < words.size
            matrix = as_strided(
                words[factor.start :],
                (factor.rows, factor.columns),
                (factor.row_step * size, factor.column_step * size),
                writeable=False,
            )
            chosen = matrix[list(factor.picked[rows])] if factor.picked else matrix[rows]
            bits = np.ascontiguousarray(chosen[:, columns])
            return convert.cast(bits, factor.stored_as, F32).view(np.float32).astype(np.float64)

    @contextmanager
    def _stored(self, part: AddLowRank, first: int, last: int, across: bool) -> Iterator[Stored]:
        """The stored values of lines [first, last): rows of the weight, or of its transpose where `across`."""
        if part.scales is not None:
            groups = part.columns // GROUP
            blocks, scales, begin = part.values, part.scales, 0
            if not across:
                blocks, scales = (
                    _narrowed(span, first, last, span.nbytes // part.rows) for span in (blocks, scales)
                )
                begin = first
            with self._regions.open(blocks) as raw, self._regions.open(scales) as raw_scales:
                yield Packed(
                    raw.reshape(-1, groups, mxfp4.BLOCK_BYTES), raw_scales.reshape(-1, groups), begin, across
                )
            return
        lines = part.columns if part.transposed else part.rows
        width = part.rows if part.transposed else part.columns
        if part.transposed != across:  # lines lie across the stored ones
            with self._regions.open(part.values) as raw:
                yield Dense(convert.words_of(raw, part.source).reshape(lines, width).T, part.source, 0)
            return
        span = _narrowed(part.values, first, last, part.values.nbytes // lines)
        with self._regions.open(span) as raw:
            yield Dense(convert.words_of(raw, part.source).reshape(-1, width), part.source, first)

    def _where(self, part: AddLowRank) -> str:
        return f"{self._shards[part.values.shard].where}: tensor {part.tensor!r}"


class Dense:
    """Values of a dense format, bits [lines, width] from line `first`."""

    def __init__(self, words: convert.Words, stored_as: ExpertFormat, first: int) -> None:
        self._words, self._stored_as, self._first = words, stored_as, first

    def lines(self, first: int, last: int) -> Rows:
        bits = np.ascontiguousarray(self._words[first - self._first : last - self._first])
        return convert.cast(bits, self._stored_as, F32).view(np.float32)


class Packed:
    """MXFP4 blocks and scales of rows from `first`; lines are rows, or columns where `across`."""

    def __init__(
        self, blocks: NDArray[np.uint8], scales: NDArray[np.uint8], first: int, across: bool
    ) -> None:
        self._blocks, self._scales, self._first, self._across = blocks, scales, first, across

    def lines(self, first: int, last: int) -> Rows:
        if self._across:
            groups = slice(first // GROUP, -(-last // GROUP))
            bits = mxfp4.decode_transposed(self._blocks[:, groups], self._scales[:, groups])
            bits = bits[first % GROUP : first % GROUP + last - first]
        else:
            rows = slice(first - self._first, last - self._first)
            bits = mxfp4.decode(self._blocks[rows], self._scales[rows])
        return convert.cast(bits, BF16, F32).view(np.float32)


Stored = Dense | Packed


def _product(left: NDArray[np.float64], right: NDArray[np.float64]) -> Rows:
    """left [n, rank] @ right [rank, m] in float64, rounded to float32.

    Tile by tile: a product so small is one thread's in OpenBLAS, whose threads would wait for one another here.
    """
    (lines, rank), width = left.shape, right.shape[1]
    result = np.empty((lines, width), np.float32)
    step = max(16, TILE_PRODUCTS // (rank * min(lines, TILE_LINES)) // 16 * 16)
    for top in range(0, lines, TILE_LINES):
        rows = slice(top, top + TILE_LINES)
        for begin in range(0, width, step):
            columns = slice(begin, begin + step)
            result[rows, columns] = left[rows] @ right[:, columns]
    return result


def _sum_of_squares(values: Rows) -> float:
    return float(np.einsum("ij,ij->", values, values, dtype=np.float64))


def _narrowed(span: Span, first: int, last: int, line: int) -> Span:
    return Span(span.shard, span.offset + first * line, (last - first) * line)


def _runs(first: int, last: int, width: int) -> Iterator[tuple[int, int]]:
    """Lines [first, last) in runs of about `STRIP_VALUES`, that begin at whole groups where they can."""
    step = max(1, STRIP_VALUES // width)
    step = step // GROUP * GROUP or step
    for begin in range(first, last, step):
        yield begin, min(last, begin + step)
