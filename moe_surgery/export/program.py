"""A `GgufProgram`: the whole output file as pure data, each tensor a list of parts."""

from __future__ import annotations

from dataclasses import dataclass

from moe_surgery.checkpoint.gguf.writer import TensorEntry
from moe_surgery.engine.spans import Copy, Span
from moe_surgery.export.ggml import BLOCK_BYTES, BLOCK_VALUES
from moe_surgery.formats import q8_0
from moe_surgery.formats.expert_format import ExpertFormat

__all__ = [
    "GgufPart",
    "GgufProgram",
    "GgufTensor",
    "Pack",
    "Pad",
    "Quantise",
    "QuantiseQ8",
    "Transpose",
    "Widen",
]


@dataclass(frozen=True, slots=True)
class Pad:
    """Zeros up to the next aligned position."""

    nbytes: int
    spans_read = ()


@dataclass(frozen=True, slots=True)
class Widen:
    """Elements first, first + step, ... of a run of BF16, F16 or F32 numbers, as float32."""

    span: Span
    dtype: str
    first: int = 0
    step: int = 1

    @property
    def nbytes(self) -> int:
        return self.span.nbytes // (4 if self.dtype == "F32" else 2) // self.step * 4

    @property
    def spans_read(self) -> tuple[Span, ...]:
        return (self.span,)


@dataclass(frozen=True, slots=True)
class Pack:
    """Rows first, first + step, ... of one expert's MXFP4 weight [rows, columns] as ggml blocks."""

    blocks: Span
    scales: Span
    rows: int
    columns: int
    first: int = 0
    step: int = 1

    @property
    def row_bytes(self) -> int:
        return self.columns // BLOCK_VALUES * BLOCK_BYTES

    @property
    def nbytes(self) -> int:
        return self.rows // self.step * self.row_bytes

    @property
    def spans_read(self) -> tuple[Span, ...]:
        return (self.blocks, self.scales)


@dataclass(frozen=True, slots=True)
class Transpose:
    """Rows first, first + step, ... of one expert's weight [rows, columns], stored transposed in `format`."""

    values: Span
    rows: int
    columns: int
    first: int
    step: int
    format: ExpertFormat

    @property
    def row_bytes(self) -> int:
        return self.format.nbytes(self.columns)

    @property
    def nbytes(self) -> int:
        return self.rows // self.step * self.row_bytes

    @property
    def spans_read(self) -> tuple[Span, ...]:
        return (self.values,)


@dataclass(frozen=True, slots=True)
class Quantise:
    """The same weight, stored in `format`, converted to MXFP4 as ggml blocks; `tensor` names it in errors."""

    values: Span
    rows: int
    columns: int
    first: int
    step: int
    tensor: str
    format: ExpertFormat

    @property
    def row_bytes(self) -> int:
        return self.columns // BLOCK_VALUES * BLOCK_BYTES

    @property
    def nbytes(self) -> int:
        return self.rows // self.step * self.row_bytes

    @property
    def spans_read(self) -> tuple[Span, ...]:
        return (self.values,)


@dataclass(frozen=True, slots=True)
class QuantiseQ8:
    """A matrix of rows of `columns` values, stored in `format`, converted to Q8_0; `tensor` names it in errors."""

    values: Span
    columns: int
    tensor: str
    format: ExpertFormat
    row_bytes = q8_0.BLOCK_BYTES
    """Of a block: a piece of the output may begin at any of them."""

    @property
    def nbytes(self) -> int:
        return self.values.nbytes // self.format.nbytes(q8_0.BLOCK_VALUES) * q8_0.BLOCK_BYTES

    @property
    def spans_read(self) -> tuple[Span, ...]:
        return (self.values,)


GgufPart = Copy | Pad | Widen | Pack | Transpose | Quantise | QuantiseQ8


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of the file: its entry in the table, and its contiguous parts."""

    entry: TensorEntry
    parts: tuple[GgufPart, ...]

    @property
    def nbytes(self) -> int:
        """Bytes with padding."""
        return sum(p.nbytes for p in self.parts)


@dataclass(frozen=True, slots=True)
class GgufProgram:
    """The file: `header`, then `tensors` in order. `expert_format` is that of the file, `dense_type` the type of
    attention and embedding matrices, `tokens` the size of the tokenizer (0 without one), `chat_template` whether it
    has one."""

    header: bytes
    tensors: tuple[GgufTensor, ...]
    name: str
    expert_format: ExpertFormat
    dense_type: str
    experts: int
    top_k: int
    parameters: int
    pre_tokenizer: str | None
    tokens: int
    chat_template: bool

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(t.nbytes for t in self.tensors)

    @property
    def bytes_read(self) -> int:
        """Bytes read from the source shards; weights that are split in two count twice."""
        return sum(span.nbytes for t in self.tensors for p in t.parts for span in p.spans_read)

    def bytes_by_type(self) -> dict[str, int]:
        """Bytes of tensors by their type in the file, without padding."""
        totals: dict[str, int] = {}
        for tensor in self.tensors:
            kind = tensor.entry.type.name
            totals[kind] = totals.get(kind, 0) + tensor.entry.nbytes
        return totals

    def as_dict(self) -> dict[str, object]:
        """Summary for scripts."""
        return {
            "name": self.name,
            "experts": self.experts,
            "top_k": self.top_k,
            "parameters": self.parameters,
            "expert_storage": self.expert_format.name,
            "dense_storage": self.dense_type.lower(),
            "tensors": len(self.tensors),
            "bytes_read": self.bytes_read,
            "bytes_written": self.nbytes,
            "bytes_by_type": self.bytes_by_type(),
            "pre_tokenizer": self.pre_tokenizer,
            "tokens": self.tokens,
            "chat_template": self.chat_template,
        }
