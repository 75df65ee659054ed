"""`evaluate` in parts that other processes do: batches of passages, and groups of models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from moe_surgery.quality.candidates import Candidate
from moe_surgery.quality.corpus import Passage
from moe_surgery.quality.evaluate import Measured, measure, results_of
from moe_surgery.quality.evaluation import ModelResult
from moe_surgery.quality.parts import ModelArguments, model_of
from moe_surgery.workers import Workers

__all__ = ["EvaluatePart", "evaluate_part", "evaluate_spread"]

PARTS_A_WORKER = 2

Loadable = tuple[Candidate, ModelArguments | None]
"""A candidate, and how its model is loaded (None: it is a view of the full one)."""


@dataclass(frozen=True, slots=True)
class EvaluatePart:
    """One batch of passages and some of the candidates, which have no model yet."""

    model: ModelArguments
    candidates: Sequence[Loadable]
    passages: Sequence[Passage]
    answers_only: bool


def evaluate_part(part: EvaluatePart) -> Measured:
    """`measure` of one batch, in any process. The full model runs along, as it is what the others are compared with."""
    candidates = [c if a is None else replace(c, model=model_of(a)) for c, a in part.candidates]
    return measure(model_of(part.model), [part.passages], candidates, answers_only=part.answers_only)


def evaluate_spread(
    workers: Workers,
    batches: Iterable[Sequence[Passage]],
    expected_batches: int,
    model: ModelArguments,
    candidates: Sequence[Loadable],
    *,
    answers_only: bool,
    progress: Callable[[int], None],
) -> tuple[ModelResult, ...]:
    """What `evaluate_passages` gives, with the parts done by `workers`.

    Candidates are divided into groups where there are fewer batches (about `expected_batches`) than workers can do.
    No figure depends on that: sums are added batch by batch, in their order.
    """
    wanted = -(-PARTS_A_WORKER * workers.count // max(1, expected_batches))
    count = min(max(1, len(candidates)), wanted)
    groups = [list(candidates[i::count]) for i in range(count)]
    sizes: list[int] = []
    bare = [[(replace(c, model=None), a) for c, a in group] for group in groups]

    def parts() -> Iterator[EvaluatePart]:
        for passages in batches:
            sizes.append(sum(len(p.tokens) for p in passages))
            for group in bare:
                yield EvaluatePart(model, group, passages, answers_only)

    totals = [Measured.nothing(len(group) + 1) for group in groups]
    early: dict[int, Measured] = {}
    left: dict[int, int] = {}  # groups of a batch that are not finished
    position = 0
    for number, measured in workers.run(evaluate_part, parts()):
        early[number] = measured
        batch = number // count
        left[batch] = left.get(batch, count) - 1
        if not left[batch]:
            progress(sizes[batch])
        while position in early:
            totals[position % count].add(early.pop(position))
            position += 1
    results = [results_of(t, [c for c, _ in g], answers_only) for t, g in zip(totals, groups, strict=True)]
    ordered = [results[i % count][1 + i // count] for i in range(len(candidates))]
    return (results[0][0], *ordered)
