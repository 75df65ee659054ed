"""Progress of long jobs: a callback with a `Progress`, the same for every job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Counter", "OnProgress", "Progress"]


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` units of one stage of a job.

    Stages and their units: "prune", "sweep", "export" and "verify" in bytes, "answer" in prompts, "energy"
    in experts, "profile", "search", "evaluate", "generate" and "targets" in tokens, "trace" in
    "tokens x layers", "first step" in plans, "repair" in steps. Work of an interrupted run that is resumed counts as
    done. `done` never decreases within a stage. `note` says how the result stands.
    """

    stage: str
    done: int
    total: int
    unit: str
    note: str = ""


OnProgress = Callable[[Progress], None]
"""Called in the thread that runs the job; an exception stops the job as Ctrl-C would."""


class Counter:
    """Counts the units of a stage and reports them to `progress`, once at the start and after each step.

    `parts`: a unit is done once that many parts of it are, as a token in all layers; `done` and `advance` count these.
    """

    def __init__(
        self,
        progress: OnProgress | None,
        stage: str,
        total: int,
        unit: str,
        done: int = 0,
        parts: int = 1,
    ) -> None:
        self._progress, self._stage, self._total, self._unit = progress, stage, total, unit
        self._parts, self._done = parts, done
        self.advance(0)

    def advance(self, amount: int) -> None:
        """`amount` more parts are done."""
        self._done += amount
        if self._progress:
            self._progress(Progress(self._stage, self._done // self._parts, self._total, self._unit))
