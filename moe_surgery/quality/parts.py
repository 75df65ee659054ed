"""Parts of `profile` as plain functions for other processes, and their results in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from moe_surgery.errors import InvalidInputError, UsageError
from moe_surgery.families import FAMILIES
from moe_surgery.quality.corpus import Passage
from moe_surgery.quality.layers import LayerModel
from moe_surgery.quality.open_layers import open_layers
from moe_surgery.quality.profile import profile_passages
from moe_surgery.quality.resume import identify
from moe_surgery.selection.plan import Plan
from moe_surgery.selection.statistics import ExpertStatistics, Statistics, load_statistics, save_statistics
from moe_surgery.workers import Workers

__all__ = ["ModelArguments", "Parked", "ProfilePart", "in_order", "model_of", "one_by_one", "profile_part"]


@dataclass(frozen=True, slots=True)
class ModelArguments:
    """A model as every process loads it, and what must come of that: `identity` of its checkpoint, and `computation`
    (backend, device and dtype), which may be chosen by what a machine has."""

    checkpoint: str
    device: str
    dtype: torch.dtype | None
    backend: str | None
    identity: str
    computation: tuple[tuple[str, object], ...]
    top_k: int | None = None


@lru_cache(maxsize=256)
def model_of(arguments: ModelArguments) -> LayerModel:
    """The model, one layer of it in memory, mapped once in a process.

    Raises UsageError where this machine has another checkpoint under that name, or computes otherwise.
    """
    _, identity = identify(arguments.checkpoint, FAMILIES)
    if identity != arguments.identity:
        raise UsageError(
            f"{arguments.checkpoint}: is another checkpoint on a worker's machine (identity {identity}, expected "
            f"{arguments.identity})"
        )
    model = open_layers(
        arguments.checkpoint,
        arguments.device,
        arguments.dtype,
        backend=arguments.backend,
        top_k=arguments.top_k,
    )
    found = tuple(sorted(model.computation.items()))
    if found != arguments.computation:
        raise UsageError(
            f"a worker computes with {dict(found)}, this machine with {dict(arguments.computation)}; "
            "choose `backend`, `device` and `dtype` that all have"
        )
    return model


@dataclass(frozen=True, slots=True)
class ProfilePart:
    """One batch of passages, with the arguments of `profile_passages`."""

    model: ModelArguments
    passages: Sequence[Passage]
    sequential: Plan | None


def profile_part(part: ProfilePart) -> Mapping[str, list[ExpertStatistics]]:
    """`profile_passages` of one batch, in any process."""
    return profile_passages(model_of(part.model), part.passages, sequential=part.sequential)


class Parked:
    """Statistics of parts that are finished before earlier ones, each in a file beside the job's partial file."""

    def __init__(self, partial: Path, job: str) -> None:
        self._partial, self._job = partial, job

    def _file(self, number: int) -> Path:
        return self._partial.with_name(f"{self._partial.name}-{number}")

    def get(self, number: int) -> Statistics | None:
        """The statistics of a part of this job, None where there are none."""
        file = self._file(number)
        if not file.exists():
            return None
        with suppress(InvalidInputError):
            statistics = load_statistics(file)
            if statistics.settings == {"job": self._job}:
                return statistics
        return None

    def put(self, number: int, statistics: Statistics) -> None:
        statistics.settings = {"job": self._job}
        save_statistics(statistics, self._file(number))

    def drop(self, number: int) -> None:
        with suppress(OSError):
            self._file(number).unlink()


def one_by_one(
    batches: Iterable[tuple[int, Sequence[Passage]]],
    parked: Parked,
    measure: Callable[[Sequence[Passage]], Statistics],
    advance: Callable[[int], None],
) -> Iterator[tuple[int, Statistics]]:
    """Statistics of batches, in this process; those that an earlier run parked are not measured again.

    `advance` is called with the tokens of those.
    """
    for number, batch in batches:
        statistics = parked.get(number)
        if statistics is None:
            statistics = measure(batch)
        else:
            advance(_tokens(batch))
        yield number, statistics
        parked.drop(number)


def in_order(
    workers: Workers,
    parts: Iterable[tuple[int, ProfilePart]],
    first: int,
    parked: Parked,
    finish: Callable[[Sequence[Passage], Mapping[str, list[ExpertStatistics]]], Statistics],
    advance: Callable[[int], None],
) -> Iterator[tuple[int, Statistics]]:
    """Statistics of parts `first`, `first` + 1, ... in this order, however workers finish them.

    Sums of floating-point numbers depend on their order; so they are those of one process. A part that is finished
    early is parked, by this run or an earlier one, and not done again. `finish` makes statistics of a part's passages
    and what it gives, `advance` is called with the tokens of each finished part.
    """
    numbers: list[int] = []
    passages: dict[int, Sequence[Passage]] = {}

    def todo() -> Iterator[ProfilePart]:
        for number, part in parts:
            if parked.get(number) is not None:
                advance(_tokens(part.passages))
                continue
            numbers.append(number)
            passages[number] = part.passages
            yield part

    position = first
    for index, data in workers.run(profile_part, todo()):
        number = numbers[index]
        batch = passages.pop(number)
        parked.put(number, finish(batch, data))
        advance(_tokens(batch))
        while (statistics := parked.get(position)) is not None:
            yield position, statistics
            parked.drop(position)
            position += 1
    while (statistics := parked.get(position)) is not None:
        yield position, statistics
        parked.drop(position)
        position += 1


def _tokens(passages: Sequence[Passage]) -> int:
    return sum(len(p.tokens) for p in passages)
