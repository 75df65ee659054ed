"""A `GgufPruneProgram`: the output files as pure data. Spans are worked out when they are asked for: a large model
has hundreds of thousands of slices."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

import xxhash

from moe_surgery.checkpoint.gguf.block_types import BlockType
from moe_surgery.engine.spans import Copy, Literal, Span, coalesce
from moe_surgery.formats.expert_format import ExpertFormat
from moe_surgery.selection.plan import Plan
from moe_surgery.surgery.program import Remap, SourceFile

__all__ = ["GgufOutputFile", "GgufOutputTensor", "GgufPart", "GgufPruneProgram", "Head", "Pad"]


@dataclass(frozen=True, slots=True)
class Pad:
    """Zeros up to the next aligned position."""

    nbytes: int
    spans_read = ()


GgufPart = Copy | Literal | Pad | Remap


@dataclass(frozen=True, slots=True)
class Head:
    """Metadata, tensor table and padding of an output file, after its first 24 bytes."""

    parts: tuple[GgufPart, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class GgufOutputTensor:
    """A tensor of the output: all of `source`, or `kept` of its `experts` equal slices, then `padding` zeros.

    `shape` has the slowest dimension first. `renumbered`: the values are numbers of experts, which become those of
    `kept`, and no slice is left out. `nbytes` are without padding.
    """

    name: str
    type: BlockType
    shape: tuple[int, ...]
    source: Span
    kept: tuple[int, ...] | None
    experts: int
    padding: int
    renumbered: bool = False

    @property
    def dtype(self) -> str:
        return self.type.name

    @property
    def nbytes(self) -> int:
        if self.kept is None or self.renumbered:
            return self.source.nbytes
        return self.source.nbytes // self.experts * len(self.kept)

    @property
    def parts(self) -> tuple[GgufPart, ...]:
        gap = (Pad(self.padding),) if self.padding else ()
        return (*self._weights(), *gap)

    def _weights(self) -> Iterator[Copy | Remap]:
        if self.kept is None:
            yield Copy(self.source)
        elif self.renumbered:
            columns = self.shape[-1]
            yield Remap(self.source, columns, self.type.block_bytes, self.kept, self.experts, self.name)
        else:
            shard, offset, nbytes = self.source
            step = nbytes // self.experts
            yield from map(Copy, coalesce(Span(shard, offset + e * step, step) for e in self.kept))


@dataclass(frozen=True, slots=True)
class GgufOutputFile:
    """An output file: `header` (its first 24 bytes), `head`, then `weights` in order."""

    name: str
    header: bytes
    head: Head
    weights: tuple[GgufOutputTensor, ...]

    @property
    def tensors(self) -> tuple[Head | GgufOutputTensor, ...]:
        return (self.head, *self.weights)

    @property
    def data_start(self) -> int:
        return len(self.header) + self.head.nbytes

    @property
    def nbytes(self) -> int:
        return self.data_start + sum(t.nbytes + t.padding for t in self.weights)

    @property
    def bytes_read(self) -> int:
        return sum(span.nbytes for t in self.tensors for p in t.parts for span in p.spans_read)


@dataclass(frozen=True, slots=True)
class GgufPruneProgram:
    """The whole output: one file, or a split set. `keys` are the metadata's by name, as parts; `origin` the
    manifest's entries on the source, apart from its files. `alignment` in bytes."""

    plan: Plan
    expert_format: ExpertFormat
    layout: str
    sources: tuple[SourceFile, ...]
    files: tuple[GgufOutputFile, ...]
    keys: Mapping[str, tuple[GgufPart, ...]]
    alignment: int
    parameters: int
    top_k: int
    origin: Mapping[str, object] = field(default_factory=dict)

    @property
    def shards(self) -> tuple[GgufOutputFile, ...]:
        return self.files

    @property
    def nbytes(self) -> int:
        """Bytes of all output files."""
        return sum(f.nbytes for f in self.files)

    @property
    def bytes_read(self) -> int:
        """Bytes read from the source."""
        return sum(f.bytes_read for f in self.files)

    def digest(self, salt: str = "") -> str:
        """xxh3_128 over every part of the program and `salt`, as 32 hexadecimal digits."""
        state = xxhash.xxh3_128(salt.encode())
        for source in self.sources:
            state.update(repr(asdict(source)).encode())
        for file in self.files:
            state.update(repr((file.name, file.header, file.head)).encode())
            for tensor in file.weights:
                state.update(repr(tensor).encode())
        state.update(json.dumps([self.plan.as_dict(), dict(self.origin)], sort_keys=True).encode())
        return state.hexdigest()

    def as_dict(self) -> dict[str, object]:
        """Summary for scripts: files with bytes read and written."""
        return {
            "experts": self.plan.uniform_experts,
            "top_k": self.top_k,
            "parameters": self.parameters,
            "expert_storage": self.expert_format.label,
            "bytes_read": self.bytes_read,
            "bytes_written": self.nbytes,
            "shards": [
                {
                    "name": f.name,
                    "tensors": len(f.weights),
                    "bytes_read": f.bytes_read,
                    "bytes_written": f.nbytes,
                }
                for f in self.files
            ],
        }
