"""An importance matrix: sums of squared inputs of matrix products, by the name of the weight."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from moe_surgery.errors import InvalidInputError, PlanMismatchError

__all__ = ["DENSE_SIDES", "DOWN", "EXPERT_INPUTS", "Block", "Entry", "Imatrix", "add"]

Floats = npt.NDArray[np.floating[Any]]
Counts = npt.NDArray[np.int64]

EXPERT_INPUTS: Final = ("ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_gate_up_exps.weight")
"""Weights of a block that read the layer's input; ik_llama.cpp's fused kernels store only one of a pair."""
DOWN: Final = "ffn_down_exps.weight"
DENSE_SIDES: Final = ("ffn_gate_inp.weight", "ffn_up_shexp.weight", "ffn_gate_shexp.weight")
"""Dense weights of a block that read the same input as its experts: the router, the shared expert."""
_BLOCK: Final = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.(.+)", re.ASCII)


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """The inputs of one weight: `sums` [E, inputs], for each channel the sum of its squares over the tokens that
    chose the expert; `counts` int64 [E] are these tokens. A dense weight has E = 1.

    Of a legacy file `counts` is None, `sums` is [1, values] with the values as they are stored, and `calls` is
    what they were multiplied with; `solve_counts` turns these into sums and counts.
    """

    sums: Floats
    counts: Counts | None
    calls: int = 0

    @property
    def experts(self) -> int:
        return len(self.sums)


@dataclass(frozen=True, slots=True)
class Block:
    """The entries of a layer with experts, by what follows `blk.N.` in the names of their weights."""

    number: int
    entries: Mapping[str, Entry]

    @property
    def expert_input(self) -> Entry | None:
        """The entry of the experts' first product, whichever there is."""
        return next((self.entries[name] for name in EXPERT_INPUTS if name in self.entries), None)

    @property
    def down(self) -> Entry | None:
        return self.entries.get(DOWN)


@dataclass(frozen=True, slots=True)
class Imatrix:
    """`entries` by the names of their weights; `where` names the file or files.

    `datasets` are the texts that it was made from, as the file has them, `chunks` how many pieces of `chunk_size`
    tokens they were cut into (0 where the file does not say). `legacy`: counts are still to be solved for.
    `residuals` are the relative errors of solved counts by layer, `digests` the xxh3_128 of each file.
    `notes` say what was left out.
    """

    where: str
    entries: Mapping[str, Entry]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 0
    legacy: bool = False
    digests: tuple[str, ...] = ()
    residuals: Mapping[int, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def blocks(self) -> Iterator[Block]:
        """The layers with entries of experts, ascending."""
        grouped: dict[int, dict[str, Entry]] = {}
        for name, entry in self.entries.items():
            if match := _BLOCK.fullmatch(name):
                grouped.setdefault(int(match[1]), {})[match[2]] = entry
        for number in sorted(grouped):
            block = Block(number, grouped[number])
            if block.expert_input is not None or block.down is not None:
                yield block


def add(matrices: Sequence[Imatrix]) -> Imatrix:
    """The matrix of all their texts together: sums and counts added.

    Where one of them lacks entries of a block that another has, the block is that of those which have most.
    Raises PlanMismatchError for matrices of different shapes, InvalidInputError for the same file twice and
    for one whose counts are not solved.
    """
    first, *others = matrices
    if not others:
        return first
    for number, matrix in enumerate(matrices):
        if matrix.legacy:
            raise InvalidInputError(f"{matrix.where}: has no counts; solve for them before adding")
        if any(set(matrix.digests) & set(other.digests) for other in matrices[:number]):
            raise InvalidInputError(f"{matrix.where}: is given twice, and would count twice")
    entries: dict[str, Entry] = {}
    notes = [note for matrix in matrices for note in matrix.notes]
    for block in dict.fromkeys(_block_of(name) for matrix in matrices for name in matrix.entries):
        parts = [{n: e for n, e in m.entries.items() if _block_of(n) == block} for m in matrices]
        most = max(parts, key=len).keys()
        for matrix, part in zip(matrices, parts, strict=True):
            if lacking := sorted(most - part.keys()):
                notes.append(f"{matrix.where}: {block} lacks {lacking[0]}, so this block is not added")
        for name in most:
            having = [(m, p[name]) for m, p in zip(matrices, parts, strict=True) if p.keys() >= most]
            entries[name] = _sum(name, having)
    return replace(
        first,
        where=", ".join(matrix.where for matrix in matrices),
        entries=entries,
        datasets=tuple(dict.fromkeys(d for matrix in matrices for d in matrix.datasets)),
        chunks=sum(matrix.chunks for matrix in matrices),
        digests=tuple(digest for matrix in matrices for digest in matrix.digests),
        residuals={n: max(m.residuals.get(n, 0.0) for m in matrices) for m in matrices for n in m.residuals},
        notes=tuple(notes),
    )


def _sum(name: str, having: Sequence[tuple[Imatrix, Entry]]) -> Entry:
    (matrix, first), *others = having
    assert first.counts is not None
    sums, counts = first.sums.astype(np.float64), first.counts
    for other, entry in others:
        if entry.sums.shape != sums.shape:
            raise PlanMismatchError(
                f"{other.where}: {name} has shape {list(entry.sums.shape)}, but {list(sums.shape)} in "
                f"{matrix.where}; they are of different models"
            )
        assert entry.counts is not None
        sums += entry.sums
        counts = counts + entry.counts
    return Entry(sums.astype(np.float32), counts)


def _block_of(name: str) -> str:
    match = _BLOCK.fullmatch(name)
    return f"blk.{match[1]}" if match else name
