"""The parts of a GGUF file that are converted rather than copied: floats widened, expert weights in ggml's order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from moe_surgery.checkpoint.shard import OpenFile
from moe_surgery.engine.chunks import PartSlice
from moe_surgery.engine.mapped_regions import MappedRegions
from moe_surgery.engine.spans import Span
from moe_surgery.errors import InvalidInputError
from moe_surgery.export import ggml
from moe_surgery.export.program import Pack, Pad, Quantise, QuantiseQ8, Transpose, Widen
from moe_surgery.formats import convert, mxfp4, q8_0
from moe_surgery.formats.encode_report import EncodeReport

__all__ = ["GgufConversions"]

FLOAT_BYTES: Final = 4

Bytes = NDArray[np.uint8]
RowPart = Pack | Transpose | Quantise | QuantiseQ8


class GgufConversions:
    """The converted parts of one GGUF file. `fill` may run in several threads, in any order."""

    def __init__(self, sources: Mapping[str, OpenFile]) -> None:
        self._shards = sources
        self._regions = MappedRegions(sources)
        self._scratch = threading.local()
        self._lock = threading.Lock()
        self._reports: list[EncodeReport] = []

    def report(self) -> EncodeReport:
        """What conversion to MXFP4 lost."""
        with self._lock:
            return EncodeReport.total(self._reports)

    def fill(self, piece: PartSlice, target: memoryview) -> None:
        """Write the bytes of a piece of any part but a Copy to `target`."""
        part, out = piece.part, np.frombuffer(target, np.uint8)
        if isinstance(part, Pad):
            out[:] = 0
        elif isinstance(part, Widen):
            self._widen(part, piece.start, out)
        elif isinstance(part, Pack):
            self._rows(part, piece.start, out, self._pack)
        elif isinstance(part, Transpose):
            self._rows(part, piece.start, out, self._transpose)
        elif isinstance(part, Quantise):
            self._rows(part, piece.start, out, self._quantise)
        elif isinstance(part, QuantiseQ8):
            self._rows(part, piece.start, out, self._quantise_q8)

    def _widen(self, part: Widen, start: int, out: Bytes) -> None:
        """Chunks hold whole floats, because tensors and chunks are aligned."""
        width = 4 if part.dtype == "F32" else 2
        first, count = start // FLOAT_BYTES, len(out) // FLOAT_BYTES
        begin = (part.first + first * part.step) * width
        raw = self._read(part.span, begin, ((count - 1) * part.step + 1) * width, "numbers")
        if part.dtype == "BF16":
            bits = raw.view(np.uint16)[:: part.step].astype(np.uint32)
            out.view(np.uint32)[:] = bits << np.uint32(16)
        else:
            out.view(np.float32)[:] = raw.view(f"<f{width}")[:: part.step]

    def _rows(self, part: RowPart, start: int, out: Bytes, make: Callable[..., None]) -> None:
        """Bytes [start, start + len(out)) of a part that is made of whole rows."""
        first, skip = divmod(start, part.row_bytes)
        last = -(-(start + len(out)) // part.row_bytes)
        nbytes = (last - first) * part.row_bytes
        if nbytes == len(out):
            make(part, first, last, out, skip)
        else:
            rows = self._buffer("rows", nbytes)
            make(part, first, last, rows, skip)
            out[:] = rows[skip : skip + len(out)]

    def _pack(self, part: Pack, first: int, last: int, out: Bytes, skip: int) -> None:
        """Output rows [first, last): their source rows alternate with those of another output tensor.

        That tensor comes next in the file, so the first read keeps the range in the page cache and the
        second finds it there: the disk is read once.
        """
        groups, count = part.columns // ggml.BLOCK_VALUES, last - first
        row = groups * mxfp4.BLOCK_BYTES
        begin, number = first * part.step, count * part.step
        again = part.first + 1 < part.step
        blocks = self._read(part.blocks, begin * row, number * row, "blocks", cache=again)
        scales = self._read(part.scales, begin * groups, number * groups, "scales", cache=again)
        if part.step > 1 and not again and last * part.step == part.rows:
            for span in (part.blocks, part.scales):  # as a whole: parts of a large page would not be dropped
                self._shards[span.shard].drop_cache(span.offset, span.nbytes)
        ggml.pack(
            blocks.reshape(count, part.step, groups, mxfp4.BLOCK_BYTES)[:, part.first],
            scales.reshape(count, part.step, groups)[:, part.first],
            out,
        )

    def _transpose(self, part: Transpose, first: int, last: int, out: Bytes, skip: int) -> None:
        with self._regions.open(part.values) as raw:
            rows = convert.words_of(out, part.format).reshape(last - first, part.columns)
            rows[:] = _chosen(part, raw, first, last).T

    def _quantise(self, part: Quantise, first: int, last: int, out: Bytes, skip: int) -> None:
        """A row that two chunks share is converted in both and counted in the first."""
        with self._regions.open(part.values) as raw:
            values = np.ascontiguousarray(_chosen(part, raw, first, last))
        cut, groups = 1 if skip else 0, part.columns // ggml.BLOCK_VALUES
        for begin, end, counts in ((0, cut, False), (cut, last - first, True)):
            if begin == end:
                continue
            try:
                blocks = np.empty((end - begin, groups, mxfp4.BLOCK_BYTES), np.uint8)
                scales = np.empty((end - begin, groups), np.uint8)
                report = convert.encode_transposed(values[:, begin:end], part.format, blocks, scales)
            except InvalidInputError as error:
                file = self._shards[part.values.shard].where
                raise InvalidInputError(
                    f"{file}: tensor {part.tensor!r}, rows from {(first + begin) * part.step}: {error}; "
                    "it cannot be stored as MXFP4"
                ) from None
            ggml.pack(blocks, scales, out[begin * part.row_bytes : end * part.row_bytes])
            if counts:
                with self._lock:
                    self._reports.append(report)

    def _quantise_q8(self, part: QuantiseQ8, first: int, last: int, out: Bytes, skip: int) -> None:
        """Blocks [first, last) of the matrix."""
        width = part.format.nbytes(q8_0.BLOCK_VALUES)
        raw = self._read(part.values, first * width, (last - first) * width, "values")
        try:
            q8_0.encode(convert.words_of(raw, part.format), part.format, out)
        except InvalidInputError as error:
            file, row = self._shards[part.values.shard].where, first * q8_0.BLOCK_VALUES // part.columns
            raise InvalidInputError(
                f"{file}: tensor {part.tensor!r}, from row {row}: {error}; it cannot be stored as Q8_0"
            ) from None

    def _read(self, span: Span, start: int, nbytes: int, role: str, *, cache: bool = False) -> Bytes:
        """Bytes [start, start + nbytes) of `span`, valid until this thread's next read with that role."""
        buffer = self._buffer(role, nbytes)
        self._shards[span.shard].read_into(span.offset + start, buffer.data, cache=cache)
        return buffer

    def _buffer(self, role: str, nbytes: int) -> Bytes:
        """A per-thread buffer of `nbytes` bytes: new memory for every chunk would cost page faults."""
        buffer: Bytes | None = getattr(self._scratch, role, None)
        if buffer is None or len(buffer) < nbytes:
            buffer = np.empty(nbytes, np.uint8)
            setattr(self._scratch, role, buffer)
        return buffer[:nbytes]


def _chosen(part: Transpose | Quantise, raw: Bytes, first: int, last: int) -> convert.Words:
    """Rows [first, last) of the part as columns: bits [columns, last - first], a view of the source."""
    values = convert.words_of(raw, part.format).reshape(part.columns, part.rows)
    return values[:, part.first + first * part.step : last * part.step : part.step]
