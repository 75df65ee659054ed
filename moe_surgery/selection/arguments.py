"""Arguments that are either an object of this package or the path of its file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TypeVar

__all__ = ["Named", "PathLike", "load_if_path", "load_pairs"]

PathLike = str | os.PathLike[str]
T = TypeVar("T")
Named = Iterable[tuple[str, T | PathLike] | PathLike]
"""Named objects, or paths of their files, which then serve as names."""


def load_if_path(value: T | PathLike, kind: type[T], load: Callable[[PathLike], T]) -> T:
    """`value` itself if it is a `kind`, else what `load` reads from it as a path.

    Raises TypeError for anything else, and as `load`.
    """
    if isinstance(value, kind):
        return value
    if isinstance(value, (str, os.PathLike)):
        return load(value)
    raise TypeError(f"expected {kind.__name__} or the path of its file, not {type(value).__name__}")


def load_pairs(items: Named[T], kind: type[T], load: Callable[[PathLike], T]) -> list[tuple[str, T]]:
    """All `items` loaded, with their names. Raises as `load_if_path`."""
    pairs = [item if isinstance(item, tuple) else (str(item), item) for item in items]
    return [(name, load_if_path(item, kind, load)) for name, item in pairs]
