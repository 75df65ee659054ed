"""Makes the bytes of chunks: positional reads for copies, conversions through mapped windows."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from math import fsum

import numpy as np
import numpy.typing as npt

from moe_surgery.checkpoint.shard import Shard
from moe_surgery.errors import InvalidInputError
from moe_surgery.formats import mxfp4
from moe_surgery.surgery.chunks import Chunk, Piece
from moe_surgery.surgery.program import Copy, Decode, Encode, OutputShard, Span
from moe_surgery.surgery.windows import Windows

__all__ = ["Producer"]

GROUP = mxfp4.BLOCK_VALUES


class Producer:
    """Fills the chunks of one output shard from source shards. `fill` may run in several threads."""

    def __init__(self, shard: OutputShard, sources: Mapping[str, Shard]) -> None:
        self._header = shard.header
        self._shards = sources
        self._lock = threading.Condition()
        self._windows = Windows(sources)
        self._scales: dict[Span, npt.NDArray[np.uint8]] = {}
        self._missing: Counter[Span] = Counter()
        self._untaken: Counter[Span] = Counter()
        self._failed = False
        self._reports: list[mxfp4.EncodeReport] = []

    def report(self) -> mxfp4.EncodeReport:
        """What conversion to MXFP4 lost, summed so that the order of threads does not show."""
        return mxfp4.EncodeReport(
            sum(r.blocks for r in self._reports),
            sum(r.inexact_blocks for r in self._reports),
            fsum(r.error_sq for r in self._reports),
            fsum(r.norm_sq for r in self._reports),
        )

    def fill(self, chunk: Chunk, buffer: memoryview) -> None:
        """Write the chunk's bytes to `buffer`. Raises InvalidInputError or OutputError."""
        try:
            for span, piece in _copies_joined(chunk.pieces):
                target = buffer[piece.position : piece.position + (span.nbytes if span else piece.nbytes)]
                if span is not None:
                    self._shards[span.shard].read_into(target, span.offset)
                elif piece.part is None:
                    target[:] = self._header[piece.start : piece.start + piece.nbytes]
                elif isinstance(piece.part, Decode):
                    self._decode(piece.part, piece.start, np.frombuffer(target, np.uint8))
                elif isinstance(piece.part, Encode) and piece.part.scales:
                    self._take_scales(piece.part, piece.start, np.frombuffer(target, np.uint8))
                elif isinstance(piece.part, Encode):
                    self._encode(piece.part, piece.start, np.frombuffer(target, np.uint8))
        except BaseException:
            with self._lock:  # whoever waits for scales that will not come must not wait for ever
                self._failed = True
                self._lock.notify_all()
            raise

    def _decode(self, part: Decode, start: int, out: npt.NDArray[np.uint8]) -> None:
        """Bytes [start, start + len(out)) of the transposed expert, strip by strip of 32 columns."""
        strip = GROUP * part.rows * 2
        with self._windows.open(part.blocks) as raw, self._windows.open(part.scales) as raw_scales:
            groups = part.columns // GROUP
            blocks = raw.reshape(part.rows, groups, mxfp4.BLOCK_BYTES)
            scales = raw_scales.reshape(part.rows, groups)
            for first, last, skip, target in _strips(start, out, strip):
                rows = np.empty((GROUP * (last - first), part.rows), np.uint16) if skip is not None else None
                whole = rows if rows is not None else target.view(np.uint16).reshape(-1, part.rows)
                mxfp4.decode_transposed(blocks[:, first:last], scales[:, first:last], whole)
                if rows is not None and skip is not None:
                    target[:] = rows.reshape(-1).view(np.uint8)[skip : skip + len(target)]

    def _encode(self, part: Encode, start: int, out: npt.NDArray[np.uint8]) -> None:
        """Bytes [start, start + len(out)) of the blocks, row by row; the rows' scales are put by.

        A row cut by the border of two chunks is converted in both, and counted where it begins.
        """
        groups = part.columns // GROUP
        row = groups * mxfp4.BLOCK_BYTES
        with self._windows.open(part.values) as raw:
            values = raw.view(np.uint16).reshape(part.columns, part.rows)
            for first, last, skip, target in _strips(start, out, row):
                shape = (last - first, groups, mxfp4.BLOCK_BYTES)
                scales = np.empty((last - first, groups), np.uint8)
                blocks = np.empty(shape, np.uint8) if skip is not None else target.reshape(shape)
                report = self._converted(part, values[:, first:last], blocks, scales, first)
                if skip is not None:
                    target[:] = blocks.reshape(-1)[skip : skip + len(target)]
                if not skip:
                    self._put_scales(part, first, scales, report)

    def _converted(
        self,
        part: Encode,
        values: npt.NDArray[np.uint16],
        blocks: npt.NDArray[np.uint8],
        scales: npt.NDArray[np.uint8],
        first: int,
    ) -> mxfp4.EncodeReport:
        try:
            return mxfp4.encode_transposed(values, blocks, scales)[2]
        except InvalidInputError as error:
            file = self._shards[part.values.shard].path
            raise InvalidInputError(
                f"{file}: tensor {part.tensor!r}, rows from {first}: {error}; it cannot be stored as MXFP4"
            ) from None

    def _put_scales(
        self, part: Encode, first: int, scales: npt.NDArray[np.uint8], report: mxfp4.EncodeReport
    ) -> None:
        with self._lock:
            if part.values not in self._scales:
                self._scales[part.values] = np.empty((part.rows, part.columns // GROUP), np.uint8)
                self._missing[part.values] = part.rows
                self._untaken[part.values] = self._scales[part.values].size
            self._scales[part.values][first : first + len(scales)] = scales
            self._missing[part.values] -= len(scales)
            self._reports.append(report)
            self._lock.notify_all()

    def _take_scales(self, part: Encode, start: int, out: npt.NDArray[np.uint8]) -> None:
        """Scales of an expert whose blocks are being made by chunks dispatched before this one."""
        with self._lock:
            self._lock.wait_for(
                lambda: self._failed or (part.values in self._scales and not self._missing[part.values])
            )
            if self._failed:
                return
            out[:] = self._scales[part.values].reshape(-1)[start : start + len(out)]
            self._untaken[part.values] -= len(out)
            if not self._untaken[part.values]:
                for kept in (self._scales, self._missing, self._untaken):
                    del kept[part.values]


def _copies_joined(pieces: tuple[Piece, ...]) -> Iterator[tuple[Span | None, Piece]]:
    """Every piece, runs of copies that follow one another in the source as one span with the first."""
    run: Span | None = None
    head: Piece | None = None
    for piece in pieces:
        span = _span(piece)
        if run and span and (run.shard, run.offset + run.nbytes) == (span.shard, span.offset):
            run = Span(run.shard, run.offset, run.nbytes + span.nbytes)
            continue
        if head is not None:
            yield run, head
        run, head = span, piece
    if head is not None:
        yield run, head


def _span(piece: Piece) -> Span | None:
    if not isinstance(piece.part, Copy):
        return None
    source = piece.part.span
    return Span(source.shard, source.offset + piece.start, piece.nbytes)


def _strips(
    start: int, out: npt.NDArray[np.uint8], unit: int
) -> Iterator[tuple[int, int, int | None, npt.NDArray[np.uint8]]]:
    """Cover bytes [start, start + len(out)) by whole units: (first, last, skip, target).

    `skip` None: `target` holds units [first, last) exactly. Otherwise `target` is a part of the one
    unit `first`, beginning `skip` bytes into it.
    """
    position, end = start, start + len(out)
    while position < end:
        first, skip = divmod(position, unit)
        whole = (end - position) // unit
        if skip or not whole:
            stop = min(end, (first + 1) * unit)
            yield first, first + 1, skip, out[position - start : stop - start]
        else:
            stop = position + whole * unit
            yield first, first + whole, None, out[position - start : stop - start]
        position = stop
