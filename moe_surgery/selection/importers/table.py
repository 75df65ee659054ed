"""Counts of routed tokens, layers x experts, from any source."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from moe_surgery.checkpoint.text import describe_value
from moe_surgery.errors import InvalidInputError, PlanMismatchError

__all__ = ["MAX_EXPERTS", "MAX_LAYERS", "CountTable", "by_number", "for_layers", "whole_numbers"]

Counts = npt.NDArray[np.int64]

MAX_LAYERS: Final = 10_000
MAX_EXPERTS: Final = 65_536
_LARGEST: Final = 1 << 53


@dataclass(frozen=True, slots=True, eq=False)
class CountTable:
    """`counts` int64 [layers, experts]; `numbers` are the model's numbers of these layers, None where rows have none:
    they are then all layers, or those with experts. `where` names the file, `digest` is its xxh3_128."""

    where: str
    counts: Counts
    numbers: tuple[int, ...] | None = None
    digest: str = ""


def whole_numbers(values: object, where: str) -> Counts:
    """`values` as int64, all axes kept. Raises InvalidInputError for anything but whole numbers from 0 to 2^53."""
    array: npt.NDArray[Any] = np.asarray(values)
    if array.dtype.kind not in "iuf":
        raise InvalidInputError(f"{where}: holds {array.dtype}, not numbers of tokens")
    if array.dtype.kind == "f" and (not np.isfinite(array).all() or (np.rint(array) != array).any()):
        raise InvalidInputError(
            f"{where}: holds numbers that are not whole: counts of tokens are wanted, not shares or weights"
        )
    if array.size and (array.min() < 0 or array.max() > _LARGEST):
        raise InvalidInputError(f"{where}: holds numbers of tokens below 0 or above 2^53")
    return array.astype(np.int64)


def by_number(rows: Mapping[int, Mapping[int, int] | Sequence[int]], where: str) -> CountTable:
    """A table from rows by layer number, each counts by expert number or a list; experts not named have 0."""
    numbers = sorted(rows)
    width = 0
    for row in rows.values():
        width = max(width, len(row) if not isinstance(row, Mapping) else max(row, default=-1) + 1)
    if not width:
        raise InvalidInputError(f"{where}: names no expert")
    counts = np.zeros((len(numbers), width), np.int64)
    for i, number in enumerate(numbers):
        row = rows[number]
        if isinstance(row, Mapping):
            for expert, count in row.items():
                counts[i, expert] = count
        elif len(row) != width:
            raise InvalidInputError(f"{where}: layer {number} has {len(row)} experts, others have {width}")
        else:
            counts[i] = row
    return CountTable(where, counts, tuple(numbers))


def for_layers(table: CountTable, numbers: Sequence[int], experts: int, model: str) -> Counts:
    """The counts of the layers `numbers` of a model of `experts` experts, called `model`, int64 [layers, experts].

    Layers that the table lacks have counts of 0. Raises PlanMismatchError where it does not fit.
    """
    rows, width = table.counts.shape
    if width > experts or (width < experts and table.numbers is None):
        raise PlanMismatchError(f"{table.where}: counts {width} experts a layer, but {model} has {experts}")
    if table.numbers is None:
        if rows == len(numbers):
            return table.counts
        if rows <= max(numbers):
            raise PlanMismatchError(
                f"{table.where}: has {rows} layers, but {model} has {len(numbers)} with experts, up to number "
                f"{max(numbers)}"
            )
    found = dict(zip(table.numbers or range(rows), table.counts, strict=True))
    result = np.zeros((len(numbers), experts), np.int64)
    for i, number in enumerate(numbers):
        if number in found:
            result[i, :width] = found.pop(number)
    last = max(numbers)  # later ones are for multi-token prediction
    other = next((number for number, row in found.items() if row.any() and number <= last), None)
    if other is not None:
        raise PlanMismatchError(
            f"{table.where}: counts tokens in layer {other}, where {model} has no experts"
        )
    return result


def count(value: object, where: str) -> int:
    """`value`, of a JSON or CSV file, as a count. Raises InvalidInputError."""
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise InvalidInputError(
            f"{where} is {describe_value(value)}, not a number of tokens (a whole number from 0)"
        )
    return value
