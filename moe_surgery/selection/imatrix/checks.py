"""Whether an importance matrix belongs to a model: four identities that hold for no other.

For every layer, with E experts of which a token chooses k: the weights have the matrix's names and shapes; counts over
experts add up to k times the router's; so do the sums of squares, channel by channel; and after an RMSNorm with
weight w, sum_j x_j^2 / w_j^2 is the number of channels for every token.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from moe_surgery.errors import PlanMismatchError
from moe_surgery.selection.imatrix.matrix import DENSE_SIDES, DOWN, EXPERT_INPUTS, Block, Entry, Imatrix
from moe_surgery.selection.imatrix.weights import Weights

__all__ = ["check_belongs", "check_shapes"]

SUMS_TOLERANCE: Final = 2e-3
"""Of sums in float32 over any number of tokens; 6e-6 was measured."""
NORM_TOLERANCE: Final = 2e-2
"""The norm's epsilon lowers the sum; 8e-4 was measured where inputs are tiny."""


def check_shapes(matrix: Imatrix, weights: Weights) -> None:
    """Raise PlanMismatchError unless the entries of layers with experts have the model's names and shapes.

    Of a legacy matrix without counts, the numbers of values are compared.
    """
    numbers = set(weights.spec.layer_numbers)
    for block in matrix.blocks():
        if block.number not in numbers:
            if any(weights.shape(f"blk.{block.number}.{name}") for name in (*EXPERT_INPUTS, DOWN)):
                continue  # a layer for multi-token prediction
            raise PlanMismatchError(
                f"{matrix.where}: has experts in block {block.number}, but the layers with experts of {weights.where} "
                f"are {_listed(sorted(numbers))}; the matrix is of another model"
            )
        for name in (*EXPERT_INPUTS, DOWN, *DENSE_SIDES):
            entry = block.entries.get(name)
            expected = weights.shape(f"blk.{block.number}.{name}")
            if entry is not None and expected is not None:
                _check_shape(matrix, f"blk.{block.number}.{name}", entry, expected, weights)


def _check_shape(
    matrix: Imatrix, name: str, entry: Entry, expected: tuple[int, int], weights: Weights
) -> None:
    if entry.counts is None and entry.sums.size == expected[0] * expected[1]:
        return
    if entry.counts is not None and entry.sums.shape == expected:
        return
    actual = (
        f"{entry.sums.size:,} values"
        if entry.counts is None
        else f"{entry.sums.shape[0]} x {entry.sums.shape[1]:,} values"
    )
    pruned = expected[0] != entry.experts and expected[0] > 1 and entry.counts is not None
    raise PlanMismatchError(
        f"{matrix.where}: {name} has {actual}, but {weights.where} has {expected[0]} x {expected[1]:,} inputs; the "
        "matrix is of another model" + (", or of this one with other experts" if pruned else "")
    )


def check_belongs(matrix: Imatrix, weights: Weights) -> None:
    """Raise PlanMismatchError, naming the check and how far off it is, unless `matrix` is of this model.

    Counts must be known (`solve_counts`). Identities are checked where both of their sides are at hand.
    """
    check_shapes(matrix, weights)
    for block in matrix.blocks():
        first = block.expert_input
        where = f"{matrix.where}: block {block.number}"
        for name in (*EXPERT_INPUTS, DOWN):
            entry = block.entries.get(name)
            if entry is not None and entry.experts != weights.spec.experts:
                raise PlanMismatchError(
                    f"{where}: {name} has {entry.experts} experts, but {weights.where} has {weights.spec.experts}; the "
                    "matrix is of another model, or of this one with other experts"
                )
            if first is not None and entry is not None and not np.array_equal(_counts(entry), _counts(first)):
                raise PlanMismatchError(
                    f"{where}: {name} has other counts than the weights beside it; the matrix is damaged"
                )
        if first is None or block.number not in weights.spec.layer_numbers:
            continue
        _check_counts(where, block, first, weights, slack=len(matrix.residuals) > 0)
        if weights.same_inputs:
            _check_sums(where, block, first, weights)
            _check_norm(where, block, first, weights)


def _check_counts(where: str, block: Block, first: Entry, weights: Weights, *, slack: bool) -> None:
    dense = _dense_side(block)
    if dense is None or dense.counts is None or first.counts is None:
        return
    total, expected = int(first.counts.sum()), weights.spec.top_k * int(dense.counts[0])
    allowed = first.experts if slack else 0  # solved counts are rounded one by one
    if abs(total - expected) > allowed:
        raise PlanMismatchError(
            f"{where}: {total:,} tokens in all experts, but {weights.spec.top_k} experts for each of "
            f"{int(dense.counts[0]):,} tokens make {expected:,}; the matrix is of a model with another number of "
            "experts per token, or was made with another number"
        )


def _check_sums(where: str, block: Block, first: Entry, weights: Weights) -> None:
    dense = _dense_side(block)
    if dense is None or dense.sums.shape[1] != first.sums.shape[1]:
        return
    total = first.sums.sum(axis=0, dtype=np.float64)
    expected = weights.spec.top_k * dense.sums[0].astype(np.float64)
    off = _off(total, expected)
    if off > SUMS_TOLERANCE:
        raise PlanMismatchError(
            f"{where}: the experts' inputs do not add up to {weights.spec.top_k} times the router's (off by "
            f"{off:.2%}); the matrix is of another model"
        )


def _check_norm(where: str, block: Block, first: Entry, weights: Weights) -> None:
    norm = weights.norm(block.number)
    if norm is None or norm.size != first.sums.shape[1] or first.counts is None or not first.counts.sum():
        return
    if (norm == 0).any():
        return
    total = float((first.sums.sum(axis=0, dtype=np.float64) / (norm * norm)).sum())
    expected = float(first.counts.sum()) * norm.size
    if abs(total / expected - 1) > NORM_TOLERANCE:
        raise PlanMismatchError(
            f"{where}: inputs divided by the weight of the norm before them have a mean square of "
            f"{total / expected:.4g}, not 1; the matrix is of another model than {weights.where}"
        )


def _counts(entry: Entry) -> npt.NDArray[np.int64]:
    assert entry.counts is not None
    return entry.counts


def _dense_side(block: Block) -> Entry | None:
    return next((block.entries[name] for name in DENSE_SIDES if name in block.entries), None)


def _off(actual: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """The distance of two vectors, relative to `expected`."""
    size = float(np.linalg.norm(expected))
    return float(np.linalg.norm(actual - expected)) / size if size else float(np.any(actual != 0))


def _listed(numbers: list[int]) -> str:
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers[:6])) + (", ..." if len(numbers) > 6 else "")
