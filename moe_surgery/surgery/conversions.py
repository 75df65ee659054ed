"""Converts expert weights between formats; packed formats through mapped regions of the source."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import numpy.typing as npt

from moe_surgery.checkpoint.shard import OpenFile
from moe_surgery.engine.chunks import PartSlice
from moe_surgery.engine.mapped_regions import MappedRegions
from moe_surgery.errors import InvalidInputError
from moe_surgery.formats import convert, mxfp4
from moe_surgery.formats.encode_report import EncodeReport
from moe_surgery.formats.expert_format import BF16, ExpertFormat
from moe_surgery.surgery.encoded_scales import EncodedScales
from moe_surgery.surgery.program import Cast, Decode, Encode

__all__ = ["Conversions", "strips"]

GROUP = mxfp4.BLOCK_VALUES


class Conversions:
    """The converted parts of one output shard. `fill` may run in several threads, in any order."""

    def __init__(self, sources: Mapping[str, OpenFile]) -> None:
        self._shards = sources
        self._lock = threading.Lock()
        self._regions = MappedRegions(sources)
        self._scales = EncodedScales()
        self._reports: list[EncodeReport] = []

    def report(self) -> EncodeReport:
        """What conversion to MXFP4 lost."""
        with self._lock:
            return EncodeReport.total(self._reports)

    def fill(self, piece: PartSlice, target: memoryview) -> None:
        """Write the bytes of a piece of a Decode, Cast or Encode part to `target`."""
        out = np.frombuffer(target, np.uint8)
        if isinstance(piece.part, Decode):
            self._decode(piece.part, piece.start, out)
        elif isinstance(piece.part, Cast):
            self._cast(piece.part, piece.start, out)
        elif isinstance(piece.part, Encode) and piece.part.scales:
            part = piece.part
            self._scales.consume(part, piece.start, out, partial(self._encode_scales, part))
        elif isinstance(piece.part, Encode):
            self._encode(piece.part, piece.start, out)

    def _decode(self, part: Decode, start: int, out: npt.NDArray[np.uint8]) -> None:
        """Bytes [start, start + len(out)) of the transposed expert, strip by strip of 32 columns."""
        strip = part.target.nbytes(GROUP * part.rows)
        with self._regions.open(part.blocks) as raw, self._regions.open(part.scales) as raw_scales:
            groups = part.columns // GROUP
            blocks = raw.reshape(part.rows, groups, mxfp4.BLOCK_BYTES)
            scales = raw_scales.reshape(part.rows, groups)
            for first, last, skip, target in strips(start, out, strip):
                columns = blocks[:, first:last], scales[:, first:last]
                if skip is None and part.target == BF16:
                    mxfp4.decode_transposed(*columns, target.view(np.uint16).reshape(-1, part.rows))
                    continue
                values = self._in_format(mxfp4.decode_transposed(*columns), BF16, part)
                begin = skip or 0
                target[:] = values.reshape(-1).view(np.uint8)[begin : begin + len(target)]

    def _cast(self, part: Cast, start: int, out: npt.NDArray[np.uint8]) -> None:
        """Bytes [start, start + len(out)), read into temporary memory."""
        width = part.source.block_bytes
        shard = self._shards[part.values.shard]
        for first, last, skip, target in strips(start, out, part.target.block_bytes):
            raw = np.empty((last - first) * width, np.uint8)
            shard.read_into(part.values.offset + first * width, raw.data)
            values = self._in_format(convert.words_of(raw, part.source), part.source, part)
            begin = skip or 0
            target[:] = values.view(np.uint8)[begin : begin + len(target)]

    def _in_format(self, values: convert.Words, source: ExpertFormat, part: Cast | Decode) -> convert.Words:
        try:
            return convert.cast(values, source, part.target)
        except InvalidInputError as error:
            span = part.values if isinstance(part, Cast) else part.blocks
            raise InvalidInputError(
                f"{self._shards[span.shard].where}: tensor {part.tensor!r}: {error}; choose another `store`"
            ) from None

    def _encode(self, part: Encode, start: int, out: npt.NDArray[np.uint8]) -> None:
        """Bytes [start, start + len(out)) of the blocks, row by row; the rows' scales are kept for later.

        A row that two chunks share is converted in both and counted in the first.
        """
        groups = part.columns // GROUP
        row = groups * mxfp4.BLOCK_BYTES
        begins = -(-start // row), -(-(start + len(out)) // row)  # the rows that begin here
        with self._scales.claim(part, *begins), self._regions.open(part.values) as raw:
            values = convert.words_of(raw, part.source).reshape(part.columns, part.rows)
            for first, last, skip, target in strips(start, out, row):
                shape = (last - first, groups, mxfp4.BLOCK_BYTES)
                scales = np.empty((last - first, groups), np.uint8)
                blocks = np.empty(shape, np.uint8) if skip is not None else target.reshape(shape)
                report = self._converted(part, values[:, first:last], blocks, scales, first)
                if skip is not None:
                    target[:] = blocks.reshape(-1)[skip : skip + len(target)]
                if not skip:
                    self._scales.put(part, first, scales)
                    with self._lock:
                        self._reports.append(report)

    def _encode_scales(self, part: Encode, first: int, last: int) -> None:
        """Compute the scales of rows [first, last). The loss is counted with the blocks."""
        groups = part.columns // GROUP
        with self._scales.claim(part, first, last), self._regions.open(part.values) as raw:
            values = convert.words_of(raw, part.source).reshape(part.columns, part.rows)
            blocks = np.empty((last - first, groups, mxfp4.BLOCK_BYTES), np.uint8)
            scales = np.empty((last - first, groups), np.uint8)
            self._converted(part, values[:, first:last], blocks, scales, first)
            self._scales.put(part, first, scales)

    def _converted(
        self,
        part: Encode,
        values: convert.Words,
        blocks: npt.NDArray[np.uint8],
        scales: npt.NDArray[np.uint8],
        first: int,
    ) -> EncodeReport:
        try:
            return convert.encode_transposed(values, part.source, blocks, scales)
        except InvalidInputError as error:
            file = self._shards[part.values.shard].where
            raise InvalidInputError(
                f"{file}: tensor {part.tensor!r}, rows from {first}: {error}; it cannot be stored as MXFP4"
            ) from None


def strips(
    start: int, out: npt.NDArray[np.uint8], unit: int
) -> Iterator[tuple[int, int, int | None, npt.NDArray[np.uint8]]]:
    """Cover bytes [start, start + len(out)) by whole units: (first, last, skip, target).

    `skip` None: `target` holds units [first, last) exactly. Otherwise `target` is a part of
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
