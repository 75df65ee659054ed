"""Where the parts of a long job are done: in this process one after another, or by other processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

__all__ = ["Workers", "everywhere"]

Part = TypeVar("Part")
Result = TypeVar("Result")


class Workers(Protocol):
    """Processes that do parts of a job, on this machine or others; `moe_surgery.distributed` has those of Ray."""

    @property
    def count(self) -> int:
        """Parts that are done at a time."""
        ...

    def run(self, work: Callable[[Part], Result], parts: Iterable[Part]) -> Iterator[tuple[int, Result]]:
        """Apply `work` to every part; yields the number of each and its result as they finish, in any order.

        `work` is a function of a module, parts and results can be pickled. What it raises is raised here. A part
        whose process dies is done again by another; so `work` must be able to begin where it stopped, or anew.
        """
        ...


def everywhere(path: str | os.PathLike[str]) -> str:
    """`path` for processes that work in other folders; what is no path here (a name on the hub) stays."""
    return os.path.abspath(path) if os.path.lexists(path) else os.fspath(path)
