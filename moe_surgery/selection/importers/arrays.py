"""Counts in NPY files."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from moe_surgery.errors import InvalidInputError
from moe_surgery.selection.importers.table import MAX_EXPERTS, MAX_LAYERS, CountTable, whole_numbers

__all__ = ["counts_from_npy", "table_of"]


def counts_from_npy(raw: bytes, where: str) -> CountTable:
    """An array [layers, experts] of whole numbers. Raises InvalidInputError."""
    try:
        array = np.load(io.BytesIO(raw), allow_pickle=False)
    except (ValueError, EOFError, OSError, SyntaxError) as error:
        raise InvalidInputError(f"{where}: not an NPY file that can be read: {error}") from None
    if not isinstance(array, np.ndarray) or array.ndim != 2:
        shape = list(array.shape) if isinstance(array, np.ndarray) else "several arrays"
        raise InvalidInputError(f"{where}: holds {shape}, expected one array of layers x experts")
    return table_of(array, where)


def table_of(array: Any, where: str) -> CountTable:
    """The table of an array of two axes. Raises InvalidInputError."""
    layers, experts = array.shape
    if not (1 <= layers <= MAX_LAYERS and 1 <= experts <= MAX_EXPERTS):
        raise InvalidInputError(f"{where}: has {layers} layers of {experts} experts")
    return CountTable(where, whole_numbers(array, where))
