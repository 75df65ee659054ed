"""A `Program`: everything that surgery writes, as pure data.

An output shard is a header and a list of tensors, a tensor a list of parts, and a part copies source bytes,
converts one expert's weights, or holds new bytes of a small tensor. A program can be printed, compared, resumed by
its digest, executed (`run`) and compared with its result (`verify`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import xxhash

from moe_surgery.engine.spans import Copy, Literal, Span
from moe_surgery.formats.expert_format import ExpertFormat
from moe_surgery.selection.plan import Plan

__all__ = [
    "AddLowRank",
    "Cast",
    "Decode",
    "Encode",
    "Factor",
    "OutputShard",
    "OutputTensor",
    "Part",
    "Program",
    "Remap",
    "SourceFile",
    "Update",
]


@dataclass(frozen=True, slots=True)
class Decode:
    """One expert's MXFP4 weight [rows, columns] in the dense format `target`, transposed: [columns, rows]."""

    blocks: Span
    scales: Span
    rows: int
    columns: int
    target: ExpertFormat
    tensor: str

    @property
    def nbytes(self) -> int:
        return self.target.nbytes(self.rows * self.columns)

    @property
    def spans_read(self) -> tuple[Span, ...]:
        return (self.blocks, self.scales)


@dataclass(frozen=True, slots=True)
class Cast:
    """Values of one dense format in another, in the same order."""

    values: Span
    source: ExpertFormat
    target: ExpertFormat
    tensor: str

    @property
    def nbytes(self) -> int:
        return self.values.nbytes // self.source.block_bytes * self.target.block_bytes

    @property
    def spans_read(self) -> tuple[Span, ...]:
        return (self.values,)


@dataclass(frozen=True, slots=True)
class Encode:
    """One expert's dense weight [columns, rows] as MXFP4 of [rows, columns]: its blocks or its scales.

    The scales are computed along with the blocks: once if both are in the same shard.
    """

    values: Span
    rows: int
    columns: int
    scales: bool
    tensor: str
    source: ExpertFormat

    @property
    def nbytes(self) -> int:
        return self.rows * self.columns // 32 * (1 if self.scales else 16)

    @property
    def spans_read(self) -> tuple[Span, ...]:
        return () if self.scales else (self.values,)


@dataclass(frozen=True, slots=True)
class Remap:
    """A table of expert numbers, rows of `columns` integers of `itemsize` bytes, in the numbers of `kept`.

    An entry of a dropped expert becomes one of a kept expert that its row does not have.
    """

    values: Span
    columns: int
    itemsize: int
    kept: tuple[int, ...]
    experts: int
    tensor: str

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    @property
    def spans_read(self) -> tuple[Span, ...]:
        return (self.values,)


class Factor(NamedTuple):
    """A matrix [rows, columns] within the values of `span`, stored in the dense format `stored_as`.

    Element (i, j) is value `start` + i * `row_step` + j * `column_step`. `picked` lists the rows that are used, in
    order; empty: all of them.
    """

    span: Span
    stored_as: ExpertFormat
    rows: int
    columns: int
    start: int
    row_step: int
    column_step: int
    picked: tuple[int, ...] = ()

    @property
    def used_rows(self) -> int:
        return len(self.picked) or self.rows

    @property
    def transposed(self) -> Factor:
        assert not self.picked
        return self._replace(
            rows=self.columns, columns=self.rows, row_step=self.column_step, column_step=self.row_step
        )

    def rows_from(self, first: int, rows: int) -> Factor:
        """Rows [first, first + rows)."""
        assert not self.picked
        return self._replace(rows=rows, start=self.start + first * self.row_step)


class Update(NamedTuple):
    """`scale` * up @ down, added to rows `first`, `first` + `step`, ... of a weight.

    `up` is [number of those rows, rank], `down` [rank, columns of the weight]; None stands for ones [rank, columns].
    """

    up: Factor
    down: Factor | None
    scale: float
    first: int = 0
    step: int = 1

    @property
    def rank(self) -> int:
        return self.up.columns


@dataclass(frozen=True, slots=True)
class AddLowRank:
    """A weight [rows, columns] with `updates` of disjoint rows added: all of it, or its MXFP4 blocks or scales.

    `values` holds the weight in `source`, with `scales` where that is MXFP4. Dense values are stored as
    [columns, rows] where `transposed`, before and after. The sum is rounded to `target` once; MXFP4 scales are computed
    along with the blocks.
    """

    values: Span
    scales: Span | None
    source: ExpertFormat
    rows: int
    columns: int
    transposed: bool
    updates: tuple[Update, ...]
    target: ExpertFormat
    holds_scales: bool
    tensor: str

    @property
    def nbytes(self) -> int:
        if self.target.packed:
            return self.rows * self.columns // 32 * (1 if self.holds_scales else 16)
        return self.target.nbytes(self.rows * self.columns)

    @property
    def spans_read(self) -> tuple[Span, ...]:
        """Of the checkpoint; the adapter is small, and read for many parts."""
        if self.holds_scales:
            return ()
        return (self.values,) if self.scales is None else (self.values, self.scales)


Part = Copy | Decode | Cast | Encode | Remap | AddLowRank | Literal


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the output; its parts are contiguous."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.parts)


@dataclass(frozen=True, slots=True)
class OutputShard:
    """One output file: `header` (length prefix included), then `tensors` in offset order.

    `dense`: none of its tensors counts experts, so that every plan gives the same bytes.
    """

    name: str
    header: bytes
    tensors: tuple[OutputTensor, ...]
    dense: bool = False

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(t.nbytes for t in self.tensors)

    @property
    def bytes_read(self) -> int:
        return sum(span.nbytes for t in self.tensors for p in t.parts for span in p.spans_read)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A source shard when the program was compiled."""

    name: str
    size: int
    header_digest: str


@dataclass(frozen=True, slots=True)
class Program:
    """The whole output.

    `texts` are small files with their content, `copies` maps output names of side files to names in the
    source's folder (`Folder.open`). `expert_format` is that of the output, `origin` the manifest's
    entries on the source, apart from its files, `repair` its entry on repaired tensors, if any.
    """

    plan: Plan
    expert_format: ExpertFormat
    layout: str
    sources: tuple[SourceFile, ...]
    shards: tuple[OutputShard, ...]
    texts: Mapping[str, bytes]
    copies: Mapping[str, str]
    parameters: int
    top_k: int
    origin: Mapping[str, object] = field(default_factory=dict)
    repair: Mapping[str, object] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all output shards."""
        return sum(s.nbytes for s in self.shards)

    @property
    def bytes_read(self) -> int:
        """Bytes read from the source shards."""
        return sum(s.bytes_read for s in self.shards)

    def digest(self, salt: str = "") -> str:
        """xxh3_128 over every part of the program and `salt`, as 32 hexadecimal digits."""
        state = xxhash.xxh3_128(salt.encode())
        for source in self.sources:
            state.update(repr(asdict(source)).encode())
        for shard in self.shards:
            state.update(shard.header)
            for tensor in shard.tensors:
                state.update(repr(tensor).encode())
        for name, content in self.texts.items():
            state.update(repr((name, content)).encode())
        state.update(repr(sorted(self.copies.items())).encode())
        state.update(json.dumps([self.plan.as_dict(), dict(self.origin)], sort_keys=True).encode())
        if self.repair is not None:
            state.update(json.dumps(self.repair, sort_keys=True).encode())
        return state.hexdigest()

    def as_dict(self) -> dict[str, object]:
        """Summary for scripts: files with bytes read and written."""
        return {
            "experts": self.plan.uniform_experts,
            "top_k": self.top_k,
            "parameters": self.parameters,
            "expert_storage": self.expert_format.name,
            "bytes_read": self.bytes_read,
            "bytes_written": self.nbytes,
            "shards": [
                {
                    "name": s.name,
                    "tensors": len(s.tensors),
                    "bytes_read": s.bytes_read,
                    "bytes_written": s.nbytes,
                }
                for s in self.shards
            ],
            "side_files": sorted([*self.texts, *self.copies]),
        }
