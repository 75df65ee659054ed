"""Speculative decoding on texts: acceptance, and time compared with plain decoding."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from moe_surgery.bench.memory import synchronize
from moe_surgery.bench.rounds import MedianRange, check_numbers, median_range
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
    """One prompt decoded plainly and speculatively."""

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

    `token_seconds` and `plain_token_seconds`: median over prompts of seconds per token, prefill included.
    `speed_up`: plain seconds over speculative seconds of the same prompt, median and range. Cache bytes
    are the largest of a run.
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
    speed_up: MedianRange
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
    """Every prompt greedily, plainly and at each length in alternation; the order rotates from prompt to prompt.

    Raises UsageError for lengths or numbers out of range.
    """
    check_numbers(max_new_tokens=[max_new_tokens])
    for length in lengths:
        check_length(length, "lengths", "")
    flat = [(domain, prompt) for domain, some in prompts.items() for prompt in some]

    def decode(prompt: Sequence[int]) -> list[int]:
        return generate(target, [prompt], max_new_tokens=max_new_tokens, stop_tokens=()).tokens[0]

    def draft_and_verify(prompt: Sequence[int], length: int) -> Speculated:
        return speculate(
            target, draft, [prompt], draft_length=length, max_new_tokens=max_new_tokens, stop_tokens=()
        )

    if flat:  # warm-up
        draft_and_verify(flat[0][1], lengths[0])
    for number, (domain, prompt) in enumerate(flat):
        expected: list[int] = []
        plain_seconds, results = 0.0, []
        for turn in range(len(lengths) + 1):
            i = (turn + number) % (len(lengths) + 1)
            synchronize(target.device)
            start = time.perf_counter()
            if i == len(lengths):
                expected = decode(prompt)
                plain_seconds = time.perf_counter() - start
            else:
                done = draft_and_verify(prompt, lengths[i])
                results.append((lengths[i], time.perf_counter() - start, done))
        for length, seconds, done in results:
            tokens = done.tokens[0]
            yield SpeculationRun(
                domain, length, plain_seconds, seconds, len(tokens), tokens != expected, done.statistics
            )


def speculation_figures(runs: Sequence[SpeculationRun]) -> list[SpeculationFigures]:
    """Figures of the runs so far by domain and length, all domains together last."""
    domains = list(dict.fromkeys(r.domain for r in runs))
    groups: list[tuple[str, list[SpeculationRun]]] = [
        (d, [r for r in runs if r.domain == d]) for d in domains
    ]
    if len(domains) > 1:
        groups.append(("all", list(runs)))
    figures = []
    for domain, several in groups:
        for length in sorted({r.length for r in several}):
            group = [r for r in several if r.length == length]
            total = SpeculationStatistics()
            for run in group:
                total.merge(run.statistics)
            figures.append(
                SpeculationFigures(
                    domain,
                    length,
                    len(group),
                    sum(r.differs for r in group),
                    total.acceptance,
                    total.acceptance_by_position,
                    total.tokens_per_target_step,
                    statistics.median(r.seconds / r.tokens for r in group),
                    statistics.median(r.plain_seconds / r.tokens for r in group),
                    median_range([r.plain_seconds / r.seconds for r in group]),
                    total.target_cache_bytes,
                    total.draft_cache_bytes,
                )
            )
    return figures
