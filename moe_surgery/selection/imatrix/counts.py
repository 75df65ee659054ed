"""The counts that a legacy importance matrix lacks, solved for.

A router (or shared expert) and the experts of a layer read the same input x. With m_e[j] the mean of x_j^2 over the
tokens that chose expert e, and m[j] over all tokens, sum_e f_e m_e[j] = k m[j] for every channel j, where f_e is the
share of tokens that chose e and k how many experts each chooses. These are as many equations as channels, for E
shares, which are not negative and add up to k. Where several experts only ever saw the same input, as those that the
first token of every chunk goes to, only their sum follows; it is split evenly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from moe_surgery.errors import InvalidInputError
from moe_surgery.selection.imatrix.matrix import DENSE_SIDES, DOWN, EXPERT_INPUTS, Block, Entry, Imatrix
from moe_surgery.selection.imatrix.nnls import nnls

__all__ = ["DEFAULT_CHUNK", "Routed", "solve_counts"]

Floats = npt.NDArray[np.float64]

DEFAULT_CHUNK: Final = 512
"""Tokens in a chunk of llama-imatrix unless told otherwise (-c); legacy files do not record it."""
MAX_RESIDUAL: Final = 0.01
_SUM_WEIGHT: Final = 10.0
_RAW_TOLERANCE: Final = 1e-3
_RIDGE: Final = 1e-6
"""Splits tokens evenly over experts that saw the same inputs, whose shares the equations leave open."""


@dataclass(frozen=True, slots=True)
class Routed:
    """What solving needs to know of a model: experts, experts per token, and the weight of the RMSNorm before the
    router of a block, None where that is not known (only files of early 2024, with plain sums, need it)."""

    experts: int
    top_k: int
    norm: Callable[[int], Floats | None]


def solve_counts(matrix: Imatrix, model: Routed, chunk_size: int = DEFAULT_CHUNK) -> Imatrix:
    """`matrix` (legacy) with sums and counts; itself where it has counts.

    The shares of the experts do not depend on `chunk_size`, the tokens in a chunk; counts and sums
    are in proportion to it. Layers without an entry of the router, a shared expert or the experts are left out, and
    noted. Entries of other weights are dense and keep their sums. Files with plain sums are recognised by the identity
    that these satisfy.

    Raises InvalidInputError where a block does not satisfy the equations: it is not of a model with so many
    experts, or its experts read something else than the router.
    """
    if not matrix.legacy:
        return matrix
    entries: dict[str, Entry] = {}
    residuals: dict[int, float] = {}
    notes = list(matrix.notes)
    blocks = {block.number: block for block in matrix.blocks()}
    for number, block in blocks.items():
        lacking = _lacking(block)
        if lacking:
            notes.append(
                f"{matrix.where}: block {number} has no entry of {lacking}, so its counts cannot be solved for"
            )
            continue
        solved, residual = _solve_block(matrix, block, model, chunk_size)
        residuals[number] = residual
        entries |= {f"blk.{number}.{name}": entry for name, entry in solved.items()}
    of_experts = (*EXPERT_INPUTS, DOWN)
    for name, entry in matrix.entries.items():
        if name not in entries and not name.endswith(of_experts):
            entries[name] = _dense(entry, _tokens(matrix, entry, chunk_size))
    return replace(
        matrix, entries=entries, legacy=False, chunk_size=chunk_size, residuals=residuals, notes=tuple(notes)
    )


def _lacking(block: Block) -> str:
    if block.expert_input is None:
        return "its experts' inputs"
    if _dense_side(block) is None:
        return "its router or shared expert"
    return ""


def _dense_side(block: Block) -> Entry | None:
    return next((block.entries[name] for name in DENSE_SIDES if name in block.entries), None)


def _tokens(matrix: Imatrix, entry: Entry, chunk_size: int) -> int:
    """Tokens that a dense weight saw: all chunks, or where the file does not count them one for each call."""
    return (matrix.chunks or entry.calls) * chunk_size


def _dense(entry: Entry, tokens: int) -> Entry:
    means = entry.sums.astype(np.float64) / entry.calls
    return Entry((means * tokens).astype(np.float32), np.array([tokens], np.int64))


def _solve_block(
    matrix: Imatrix, block: Block, model: Routed, chunk_size: int
) -> tuple[Mapping[str, Entry], float]:
    """The entries of a block with sums and counts, and the relative residual of its equations."""
    where = matrix.where
    dense, inputs = _dense_side(block), block.expert_input
    assert dense is not None
    assert inputs is not None
    names = [name for name in (*EXPERT_INPUTS, DOWN) if name in block.entries]
    for name in names:
        if block.entries[name].sums.size % model.experts:
            raise InvalidInputError(
                f"{where}: blk.{block.number}.{name} has {block.entries[name].sums.size:,} values, which are not those "
                f"of {model.experts} experts; the matrix is of another model"
            )
    stored = {name: _rows(block.entries[name], model.experts) for name in names}
    first = stored[next(name for name in EXPERT_INPUTS if name in stored)]
    if first.shape[1] != dense.sums.size:
        raise InvalidInputError(
            f"{where}: the experts of block {block.number} have {first.shape[1]:,} inputs, the router "
            f"{dense.sums.size:,}: counts cannot be solved for where they read different tensors; make a matrix in "
            "the form of GGUF with llama-imatrix, which stores counts"
        )
    raw = first.sum(axis=0), dense.sums[0].astype(np.float64)
    if model.top_k < model.experts and _proportional(*raw, model.top_k):
        return _plain_sums(where, block, stored, dense, model, raw)
    tokens = _tokens(matrix, dense, chunk_size)
    means = {name: rows / block.entries[name].calls for name, rows in stored.items()}
    # Writers fill in exactly `calls` for an expert that no token chose.
    unused = np.logical_and.reduce([(rows == 1.0).all(axis=1) for rows in means.values()])
    shares, residual = _shares(
        means[next(iter(means))],
        dense.sums[0] / dense.calls,
        model.top_k,
        ~unused,
        1 / tokens,
    )
    if not residual <= MAX_RESIDUAL:
        raise InvalidInputError(
            f"{where}: block {block.number}: the experts' inputs do not add up to {model.top_k} times the router's "
            f"(off by {residual:.1%}), so counts cannot be solved for: the matrix is of another model, or of an "
            "architecture whose experts read something else; make one in the form of GGUF with llama-imatrix, which "
            "stores counts"
        )
    counts = np.rint(shares * tokens).astype(np.int64)
    solved = {
        name: Entry((rows * counts[:, None]).astype(np.float32), counts) for name, rows in means.items()
    }
    solved |= {name: _dense(entry, tokens) for name, entry in block.entries.items() if name not in names}
    return solved, residual


def _shares(
    means: Floats, dense: Floats, top_k: int, used: npt.NDArray[np.bool_], least: float
) -> tuple[Floats, float]:
    """The share of tokens that chose each expert, float64 [E], and the residual: means [E, inputs], dense [inputs].

    Experts that are `used` have a share of at least `least`, that of one token.
    """
    seen = dense > 0
    equations = (means[used][:, seen] / dense[seen]).T
    rows, columns = equations.shape
    size = np.sqrt(max(rows, 1))
    a = np.vstack([equations, np.full((1, columns), _SUM_WEIGHT * size), _RIDGE * size * np.eye(columns)])
    b = np.concatenate([np.full(rows, float(top_k)), [_SUM_WEIGHT * size * top_k], np.zeros(columns)])
    shares = np.zeros(len(means))
    shares[used] = nnls(a, b - least * a.sum(axis=1)) + least
    error = equations @ shares[used] - top_k
    residual = float(np.sqrt(np.mean(error * error))) / top_k if error.size else float("inf")
    return shares, residual


def _proportional(total: Floats, dense: Floats, top_k: int) -> bool:
    """Whether plain sums over experts are `top_k` times those of the router, in every channel."""
    seen = dense > 0
    if not seen.any():
        return False
    return bool(np.abs(total[seen] / (top_k * dense[seen]) - 1).max() < _RAW_TOLERANCE)


def _plain_sums(
    where: str,
    block: Block,
    stored: Mapping[str, Floats],
    dense: Entry,
    model: Routed,
    raw: tuple[Floats, Floats],
) -> tuple[Mapping[str, Entry], float]:
    """Files with plain sums: after an RMSNorm with weight w, sum_j x_j^2 / w_j^2 is the number of channels."""
    norm = model.norm(block.number)
    if norm is None or norm.size != dense.sums.size or (norm == 0).any():
        raise InvalidInputError(
            f"{where}: holds plain sums, as files of early 2024 do; their counts follow from the weight of the norm "
            f"before the router of block {block.number}, so pass the model that the matrix was made from"
        )
    first = stored[next(name for name in EXPERT_INPUTS if name in stored)]

    def tokens(sums: Any) -> Any:
        return np.rint((sums / (norm * norm)).sum(axis=-1) / norm.size).astype(np.int64)

    counts = tokens(first)
    solved = {name: Entry(rows.astype(np.float32), counts) for name, rows in stored.items()}
    count = tokens(dense.sums.astype(np.float64))
    solved |= {name: Entry(entry.sums, count) for name, entry in block.entries.items() if name not in stored}
    total, expected = raw[0].sum(), model.top_k * raw[1].sum()
    return solved, float(abs(total - expected) / expected)


def _rows(entry: Entry, experts: int) -> Floats:
    return entry.sums.reshape(experts, -1).astype(np.float64)
