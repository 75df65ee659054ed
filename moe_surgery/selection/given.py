"""Arguments that are an object of ours or the path of the file that holds it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TypeVar

__all__ = ["Named", "PathLike", "loaded", "loaded_pairs"]

PathLike = str | os.PathLike[str]
T = TypeVar("T")
Named = Iterable[tuple[str, T | PathLike] | PathLike]
"""Objects with the names they get, or paths of their files, which then are the names."""


def loaded(given: T | PathLike, kind: type[T], load: Callable[[PathLike], T]) -> T:
    """`given` itself where it is a `kind`, or what `load` reads from it as a path.

    Raises TypeError for anything else, and as `load`.
    """
    if isinstance(given, kind):
        return given
    if isinstance(given, (str, os.PathLike)):
        return load(given)
    raise TypeError(f"expected {kind.__name__} or the path of its file, not {type(given).__name__}")


def loaded_pairs(given: Named[T], kind: type[T], load: Callable[[PathLike], T]) -> list[tuple[str, T]]:
    """All of `given` loaded, with their names. Raises as `loaded`."""
    pairs = [item if isinstance(item, tuple) else (str(item), item) for item in given]
    return [(name, loaded(item, kind, load)) for name, item in pairs]
