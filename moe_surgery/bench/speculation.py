"""What speculation gives on texts: acceptance, and time against plain decoding."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from moe_surgery.bench.memory import synchronize
from moe_surgery.bench.rounds import Spread, check_numbers, spread
from moe_surgery.runtime.generate import generate
from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.speculation.draft_length import check_length
from moe_surgery.runtime.speculation.speculate import Speculated, speculate
from moe_surgery.runtime.speculation.statistics import SpeculationStatistics

__all__ = [
    "SpeculationFigures",
    "SpeculationRun",
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


def measure_speculation(
    target: CausalLM,
    draft: CausalLM,
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
        check_length(length, "lengths", "")
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
