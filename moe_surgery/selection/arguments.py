"""Arguments in more than one form: an object of this package or the path of its file, a size as text."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from typing import TypeVar

__all__ = ["Named", "PathLike", "load_if_path", "load_pairs", "parse_size"]

PathLike = str | os.PathLike[str]
T = TypeVar("T")
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
_UNITS |= {f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)}
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


def parse_size(text: str) -> int:
    """Bytes of a size: "5GB" (5 x 10^9), "500MB", "4GiB", "4096". Raises ValueError with a message."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write 5GB (5 x 10^9 bytes), 500MB or 4GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
