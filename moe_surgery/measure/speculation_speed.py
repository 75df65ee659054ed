"""What speculation gives and costs: acceptance on texts, time against plain decoding, cost of each step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from moe_surgery.measure.memory import synchronize
from moe_surgery.measure.rounds import Spread, check_numbers, interleaved, spread
from moe_surgery.runtime.acceptance_statistics import SpeculationStatistics
from moe_surgery.runtime.draft_length import Costs, break_even, check_length, speed_up
from moe_surgery.runtime.generate import generate
from moe_surgery.runtime.model import Model
from moe_surgery.runtime.speculate import Speculated, speculate

__all__ = [
    "LengthCost",
    "SpeculationFigures",
    "SpeculationRun",
    "break_even_rows",
    "measure_costs",
    "measure_speculation",
    "speculation_figures",
]


@dataclass(frozen=True, slots=True)
class SpeculationRun:
    """One prompt decoded plainly and by speculation, one after the other."""

    domain: str
    length: int
    plain_seconds: float
    seconds: float
    tokens: int
    differs: bool
    statistics: SpeculationStatistics


@dataclass(frozen=True, slots=True)
class SpeculationFigures:
    """All prompts of a domain (or of all, "all") at one draft length.

    `token_seconds` and `plain_token_seconds`: median over prompts of seconds a token, prefill included.
    `speed_up`: plain seconds over speculative seconds of the same prompt, median and range. Cache bytes
    are the largest keys and values that a run held.
    """

    domain: str
    length: int
    prompts: int
    differing_prompts: int
    acceptance: float | None
    acceptance_by_position: list[float | None]
    tokens_per_target_step: float | None
    token_seconds: float
    plain_token_seconds: float
    speed_up: Spread
    target_cache_bytes: int
    draft_cache_bytes: int


@dataclass(frozen=True, slots=True)
class LengthCost:
    """What a draft length costs on this machine, and the acceptance that pays for it.

    Seconds of the draft's steps for one round and of the target's step over all drafted tokens, beside
    a plain step. `break_even` is the acceptance of a drafted token at which speculation is as fast as
    plain decoding, None where no acceptance is enough: it solves
    (1 - a^(n+1)) / (1 - a) = (n d + t_n) / t_0 (see `runtime.draft_length`).
    """

    length: int
    draft_seconds: float
    target_seconds: float
    plain_seconds: float
    break_even: float | None
    most_speed_up: float


def measure_speculation(
    target: Model,
    draft: Model,
    prompts: Mapping[str, Sequence[Sequence[int]]],
    *,
    lengths: Sequence[int] = (1, 2, 4, 8),
    max_new_tokens: int = 32,
) -> Iterator[SpeculationRun]:
    """Every prompt greedily, plainly and at each length in turn; who begins changes from prompt to prompt.

    Raises UsageError for lengths or numbers out of range.
    """
    check_numbers(new_tokens=[max_new_tokens])
    for length in lengths:
        check_length(length)
    flat = [(domain, prompt) for domain, some in prompts.items() for prompt in some]

    def plainly(prompt: Sequence[int]) -> list[int]:
        return generate(target, [prompt], max_new_tokens=max_new_tokens, stop_tokens=()).tokens[0]

    def speculating(prompt: Sequence[int], length: int) -> Speculated:
        return speculate(
            target, draft, [prompt], length=length, max_new_tokens=max_new_tokens, stop_tokens=()
        )

    if flat:  # not counted: the first run sets up what later ones use
        speculating(flat[0][1], lengths[0])
    for number, (domain, prompt) in enumerate(flat):
        expected: list[int] = []
        plain_seconds, found = 0.0, []
        for turn in range(len(lengths) + 1):
            way = (turn + number) % (len(lengths) + 1)
            synchronize(target.device)
            start = time.perf_counter()
            if way == len(lengths):
                expected = plainly(prompt)
                plain_seconds = time.perf_counter() - start
            else:
                done = speculating(prompt, lengths[way])
                found.append((lengths[way], time.perf_counter() - start, done))
        for length, seconds, done in found:
            tokens = done.tokens[0]
            yield SpeculationRun(
                domain, length, plain_seconds, seconds, len(tokens), tokens != expected, done.statistics
            )


def speculation_figures(runs: Sequence[SpeculationRun]) -> list[SpeculationFigures]:
    """Figures by domain and length of what was run so far, all domains together last."""
    domains = list(dict.fromkeys(r.domain for r in runs))
    groups: list[tuple[str, list[SpeculationRun]]] = [
        (d, [r for r in runs if r.domain == d]) for d in domains
    ]
    if len(domains) > 1:
        groups.append(("all", list(runs)))
    found = []
    for domain, several in groups:
        for length in sorted({r.length for r in several}):
            mine = [r for r in several if r.length == length]
            total = SpeculationStatistics()
            for run in mine:
                total.merge(run.statistics)
            found.append(
                SpeculationFigures(
                    domain,
                    length,
                    len(mine),
                    sum(r.differs for r in mine),
                    total.acceptance,
                    total.acceptance_by_position,
                    total.tokens_per_target_step,
                    statistics.median(r.seconds / r.tokens for r in mine),
                    statistics.median(r.plain_seconds / r.tokens for r in mine),
                    spread([r.plain_seconds / r.seconds for r in mine]),
                    total.target_cache_bytes,
                    total.draft_cache_bytes,
                )
            )
    return found


@torch.inference_mode()
def measure_costs(
    target: Model,
    draft: Model,
    *,
    lengths: Sequence[int] = (1, 2, 4, 8),
    batch: int = 1,
    context: int = 128,
    rounds: int = 5,
) -> Costs:
    """Median seconds of a draft step, and of target steps over 0 and `lengths` drafted tokens, in turn.

    Behind `context` random tokens; the target's costs of lengths in between are interpolated. Random
    tokens route as evenly as tokens can, so a long step reads more experts than on a text.
    """
    check_numbers(batch=[batch], context=[context], rounds=[rounds])
    for length in lengths:
        check_length(length)
    random = torch.Generator().manual_seed(0)
    most = max(lengths)
    ids = torch.randint(0, target.config.vocabulary, (batch, context + most + 1), generator=random)
    caches = {}
    for model in (target, draft):
        caches[id(model)] = model.new_cache(batch, context + most + 1, rollback=most + 1)
        model(ids[:, :context], caches[id(model)], logits_to_keep=1)

    def step(model: Model, tokens: int) -> float:
        cache = caches[id(model)]
        synchronize(model.device)
        start = time.perf_counter()
        logits = model(ids[:, context : context + tokens], cache)
        logits[:, -1].argmax(-1).tolist()
        seconds = time.perf_counter() - start
        cache.truncate(context)
        return seconds

    sizes = sorted({0, *lengths})
    jobs = [partial(step, draft, 1), *(partial(step, target, n + 1) for n in sizes)]
    for job in jobs:
        job()
    seconds: list[list[float]] = [[] for _ in jobs]
    for _, number, value in interleaved(jobs, rounds):
        seconds[number].append(value)
    drafted, *checked = map(statistics.median, seconds)
    return Costs(drafted, [_between(n, sizes, checked) for n in range(most + 1)])


def break_even_rows(costs: Costs, lengths: Sequence[int]) -> list[LengthCost]:
    """A row for each length; `most_speed_up` is what full acceptance would give."""
    return [
        LengthCost(
            n,
            n * costs.draft,
            costs.target[n],
            costs.target[0],
            break_even(n, costs),
            speed_up(1.0, n, costs),
        )
        for n in lengths
    ]


def _between(n: int, sizes: Sequence[int], values: Sequence[float]) -> float:
    """Linear between the measured sizes."""
    upper = next(i for i, size in enumerate(sizes) if size >= n)
    if sizes[upper] == n:
        return values[upper]
    a, b = sizes[upper - 1], sizes[upper]
    share = (n - a) / (b - a)
    return values[upper - 1] * (1 - share) + values[upper] * share
