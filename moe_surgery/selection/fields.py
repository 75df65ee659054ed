"""Checks on values read from plan and ranking files. Each raises InvalidInputError naming `where`."""

from __future__ import annotations

import math
from itertools import pairwise

from moe_surgery.checkpoint.text import describe_value
from moe_surgery.errors import InvalidInputError

__all__ = ["integer_rows", "is_integer", "layer_numbers", "number_rows", "optional_text", "positive"]

MAX_ROWS = 10_000
MAX_COLUMNS = 65_536


def is_integer(value: object, expected: int) -> bool:
    """Whether `value` is the integer `expected` (true and 1.0 equal 1 in Python, but not in a file)."""
    return type(value) is int and value == expected


def positive(value: object, where: str) -> int:
    """`value` as a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidInputError(f"{where} is {describe_value(value)}, not a positive integer")
    return value


def optional_text(value: object, where: str) -> str | None:
    """`value` as a string or None."""
    if value is not None and not isinstance(value, str):
        raise InvalidInputError(f"{where} is {describe_value(value)}, not a string")
    return value


def integer_rows(value: object, where: str) -> list[tuple[int, ...]]:
    """`value` as a non-empty list with one non-empty list of non-negative integers a layer."""
    rows = []
    for number, row in enumerate(_rows(value, where)):
        if any(isinstance(e, bool) or not isinstance(e, int) or e < 0 for e in row):
            raise InvalidInputError(f"{where}: layer {number} holds something that is not an expert number")
        rows.append(tuple(row))
    return rows


def layer_numbers(value: object, layers: int, where: str) -> tuple[int, ...]:
    """`value` as the ascending numbers of `layers` layers; empty where it is None or they are 0, 1, ..."""
    if value is None:
        return ()
    if (
        not isinstance(value, list)
        or len(value) != layers
        or any(type(n) is not int or n < 0 for n in value)
        or any(b <= a for a, b in pairwise(value))
    ):
        raise InvalidInputError(f"{where}: expected {layers} ascending layer numbers")
    return () if value == list(range(layers)) else tuple(value)


def number_rows(value: object, where: str) -> tuple[tuple[float, ...], ...]:
    """`value` as one list of finite numbers a layer."""
    rows = []
    for number, row in enumerate(_rows(value, where)):
        if any(isinstance(x, bool) or not isinstance(x, (int, float)) or not math.isfinite(x) for x in row):
            raise InvalidInputError(f"{where}: layer {number} holds something that is not a finite number")
        rows.append(tuple(float(x) for x in row))
    return tuple(rows)


def _rows(value: object, where: str) -> list[list]:  # type: ignore[type-arg]
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_ROWS:
        raise InvalidInputError(f"{where}: expected a list with one entry a layer (1 to {MAX_ROWS})")
    for number, row in enumerate(value):
        if not isinstance(row, list) or not 1 <= len(row) <= MAX_COLUMNS:
            raise InvalidInputError(f"{where}: layer {number} is not a list of 1 to {MAX_COLUMNS} entries")
    return value
