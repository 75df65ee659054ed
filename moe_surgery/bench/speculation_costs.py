"""Cost of the steps of speculative decoding, and the break-even acceptance."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from moe_surgery.bench.memory import synchronize
from moe_surgery.bench.rounds import check_numbers, interleaved
from moe_surgery.errors import UsageError
from moe_surgery.runtime.generate import decoder
from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.sampling import Sampler, Sampling
from moe_surgery.runtime.speculation.acceptance import accept_greedy
from moe_surgery.runtime.speculation.draft import DRAFT_LAG
from moe_surgery.runtime.speculation.draft_length import Costs, break_even, check_length, speed_up

__all__ = ["LengthCost", "StepTime", "break_even_rows", "costs_of", "measure_costs"]


@dataclass(frozen=True, slots=True)
class LengthCost:
    """Cost of a draft length on this machine, and its break-even acceptance.

    Seconds of the draft's steps of one round, of the target's step over the drafted tokens and the one
    before them (acceptance included), and of a plain step; without prefill. `break_even` is the
    acceptance rate at which speculation is as fast as plain decoding, None if no rate is enough. It
    solves
    (1 - a^(n+1)) / (1 - a) = (n d + a^n c + t_n) / t_0 (see `runtime.draft_length`).
    """

    length: int
    draft_seconds: float
    target_seconds: float
    plain_seconds: float
    break_even: float | None
    most_speed_up: float


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step. `kind`: "plain" (the target's, one token), "draft" (over `tokens` tokens, 1 or 2) or
    "check" (the target's over the last token and drafted ones, `tokens` in all)."""

    kind: str
    tokens: int
    seconds: float


class _Steps:
    """The steps of plain and speculative decoding, with `context` random tokens in the cache.

    Each ends with token ids on the CPU. A check includes what follows the target's step: acceptance,
    log-probabilities, and rolling back both caches.
    """

    @torch.inference_mode()
    def __init__(self, target: CausalLM, draft: CausalLM, batch: int, context: int, most: int) -> None:
        random = torch.Generator().manual_seed(0)
        tokens = context + most + DRAFT_LAG
        self._ids = torch.randint(0, target.config.vocab_size, (batch, tokens), generator=random)
        self._target, self._draft, self._context = target, draft, context
        self._target_cache = target.new_cache(batch, tokens, rollback=most + 1)
        self._draft_cache = draft.new_cache(batch, tokens, rollback=most + DRAFT_LAG)
        for model, cache in ((target, self._target_cache), (draft, self._draft_cache)):
            model(self._ids[:, :context], cache, logits_to_keep=1)
        self._decode = decoder(target, self._target_cache)
        self._decode_draft = decoder(draft, self._draft_cache)
        self._sampler = Sampler(Sampling())

    @torch.inference_mode()
    def plain(self) -> StepTime:
        start = self._start()
        tokens, _ = self._sampler(self._decode(self._ids[:, self._context])[:, -1])
        tokens.tolist()
        return self._finish("plain", 1, start)

    @torch.inference_mode()
    def draft(self, tokens: int) -> StepTime:
        start, ids = self._start(), self._input(tokens)
        if ids.shape == (1, 1):  # as in the drafter
            logits = self._decode_draft(ids[:, 0])
        else:
            logits = self._draft(ids, self._draft_cache, logits_to_keep=1)
        logits[:, -1].argmax(-1).tolist()
        return self._finish("draft", tokens, start)

    @torch.inference_mode()
    def check(self, tokens: int) -> StepTime:
        start, ids = self._start(), self._input(tokens)
        logits = self._target(ids, self._target_cache)
        drafted = ids[:, 1:].to(logits.device)
        counts = torch.full((len(ids),), tokens - 1, device=logits.device)
        accepted, next_token = accept_greedy(drafted, counts, logits)
        chosen = torch.cat((drafted, next_token[:, None]), dim=1)[..., None]
        torch.log_softmax(logits, dim=-1).gather(-1, chosen).tolist()
        accepted.tolist()
        self._roll_back()
        return self._finish("check", tokens, start)

    def _input(self, tokens: int) -> torch.Tensor:
        return self._ids[:, self._context : self._context + tokens]

    def _start(self) -> float:
        synchronize(self._target.device)
        return time.perf_counter()

    def _finish(self, kind: str, tokens: int, start: float) -> StepTime:
        seconds = time.perf_counter() - start
        self._roll_back()
        return StepTime(kind, tokens, seconds)

    def _roll_back(self) -> None:
        for cache in (self._target_cache, self._draft_cache):
            cache.truncate(self._context)


def measure_costs(
    target: CausalLM,
    draft: CausalLM,
    *,
    lengths: Sequence[int] = (1, 2, 4, 8),
    batch: int = 1,
    depth: int = 128,
    rounds: int = 5,
) -> Iterator[StepTime]:
    """The steps of rounds of `lengths` drafted tokens, and plain ones, in alternation; for `costs_of`.

    With `depth` random tokens in the cache: they spread over experts evenly, so a step over several tokens
    reads more experts than on real text. Raises UsageError for numbers out of range, or more tokens
    than a model's context.
    """
    check_numbers(batch=[batch], depth=[depth], rounds=[rounds])
    for length in lengths:
        check_length(length, "lengths", "")
    needed = depth + max(lengths) + DRAFT_LAG
    if needed > (most := min(target.config.max_position_embeddings, draft.config.max_position_embeddings)):
        raise UsageError(f"`depth` {depth} and `lengths` need {needed} tokens; these models support {most}")
    steps = _Steps(target, draft, batch, depth, max(lengths))
    calls: list[Callable[[], StepTime]] = [steps.plain, partial(steps.draft, 1), partial(steps.draft, 2)]
    calls += [partial(steps.check, n + 1) for n in sorted(set(lengths))]
    for call in calls:  # warm-up
        call()
    for _, _, step_time in interleaved(calls, rounds):
        yield step_time


def costs_of(times: Sequence[StepTime]) -> Costs | None:
    """Medians of the measurements so far; None if they do not cover any length.

    Target steps over other numbers of tokens, up to the longest, are interpolated.
    """
    seconds: dict[tuple[str, int], list[float]] = {}
    for each in times:
        seconds.setdefault((each.kind, each.tokens), []).append(each.seconds)
    medians = {step: statistics.median(several) for step, several in seconds.items()}
    sizes = sorted(tokens for kind, tokens in medians if kind == "check")
    if not sizes or {("plain", 1), ("draft", 1), ("draft", 2)} - medians.keys():
        return None
    sizes, values = [1, *sizes], [medians["plain", 1], *(medians["check", n] for n in sizes)]
    target = [_interpolate(n, sizes, values) for n in range(1, sizes[-1] + 1)]
    one, two = medians["draft", 1], medians["draft", 2]
    return Costs(one, target, max(0.0, two - one))


def break_even_rows(costs: Costs, lengths: Sequence[int]) -> list[LengthCost]:
    """A row for each measured length; `most_speed_up` is the speed-up at full acceptance."""
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
        if n < len(costs.target)
    ]


def _interpolate(n: int, sizes: Sequence[int], values: Sequence[float]) -> float:
    """Linear interpolation between the measured sizes."""
    upper = next(i for i, size in enumerate(sizes) if size >= n)
    if sizes[upper] == n:
        return values[upper]
    a, b = sizes[upper - 1], sizes[upper]
    share = (n - a) / (b - a)
    return values[upper - 1] * (1 - share) + values[upper] * share
