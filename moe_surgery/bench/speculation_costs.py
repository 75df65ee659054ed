"""What the steps of speculation cost, and the acceptance that pays for them."""

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
from moe_surgery.runtime.speculation.draft import BEHIND
from moe_surgery.runtime.speculation.draft_length import Costs, break_even, check_length, speed_up

__all__ = ["LengthCost", "StepTime", "break_even_rows", "costs_of", "measure_costs"]


@dataclass(frozen=True, slots=True)
class LengthCost:
    """What a draft length costs on this machine, and the acceptance that pays for it.

    Seconds of the draft's steps for one round and of the target's step over all drafted tokens and the one
    before them (acceptance included), beside a plain step; prefill is left out. `break_even` is the
    acceptance of a drafted token at which speculation is as fast as plain decoding, None where no
    acceptance is enough: it solves
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
    """The steps that plain decoding and speculation are made of, behind `context` random tokens.

    Each ends with token numbers on the CPU. A check is what follows the target's step as well: acceptance,
    log-probabilities, and both caches as they were.
    """

    @torch.inference_mode()
    def __init__(self, target: CausalLM, draft: CausalLM, batch: int, context: int, most: int) -> None:
        random = torch.Generator().manual_seed(0)
        tokens = context + most + BEHIND
        self._ids = torch.randint(0, target.config.vocab_size, (batch, tokens), generator=random)
        self._target, self._draft, self._context = target, draft, context
        self._target_cache = target.new_cache(batch, tokens, rollback=most + 1)
        self._draft_cache = draft.new_cache(batch, tokens, rollback=most + BEHIND)
        for model, cache in ((target, self._target_cache), (draft, self._draft_cache)):
            model(self._ids[:, :context], cache, logits_to_keep=1)
        self._plain = decoder(target, self._target_cache)
        self._drafting = decoder(draft, self._draft_cache)
        self._sampler = Sampler(Sampling())

    @torch.inference_mode()
    def plain(self) -> StepTime:
        start = self._begun()
        tokens, _ = self._sampler(self._plain(self._ids[:, self._context])[:, -1])
        tokens.tolist()
        return self._ended("plain", 1, start)

    @torch.inference_mode()
    def draft(self, tokens: int) -> StepTime:
        start, fed = self._begun(), self._fed(tokens)
        if fed.shape == (1, 1):  # as the drafter has it
            logits = self._drafting(fed[:, 0])
        else:
            logits = self._draft(fed, self._draft_cache, logits_to_keep=1)
        logits[:, -1].argmax(-1).tolist()
        return self._ended("draft", tokens, start)

    @torch.inference_mode()
    def check(self, tokens: int) -> StepTime:
        start, fed = self._begun(), self._fed(tokens)
        logits = self._target(fed, self._target_cache)
        drafted = fed[:, 1:].to(logits.device)
        counts = torch.full((len(fed),), tokens - 1, device=logits.device)
        kept, after = accept_greedy(drafted, counts, logits)
        chosen = torch.cat((drafted, after[:, None]), dim=1)[..., None]
        torch.log_softmax(logits, dim=-1).gather(-1, chosen).tolist()
        kept.tolist()
        self._take_back()
        return self._ended("check", tokens, start)

    def _fed(self, tokens: int) -> torch.Tensor:
        return self._ids[:, self._context : self._context + tokens]

    def _begun(self) -> float:
        synchronize(self._target.device)
        return time.perf_counter()

    def _ended(self, kind: str, tokens: int, start: float) -> StepTime:
        seconds = time.perf_counter() - start
        self._take_back()
        return StepTime(kind, tokens, seconds)

    def _take_back(self) -> None:
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
    """The steps that rounds of `lengths` drafted tokens are made of, and plain ones, in turn; for `costs_of`.

    Behind `depth` random tokens: they route as evenly as tokens can, so a long step reads more experts than
    on a text. Raises UsageError for numbers out of range, or more tokens than a model takes.
    """
    check_numbers(batch=[batch], depth=[depth], rounds=[rounds])
    for length in lengths:
        check_length(length, "lengths", "")
    needed = depth + max(lengths) + BEHIND
    if needed > (most := min(target.config.max_position_embeddings, draft.config.max_position_embeddings)):
        raise UsageError(f"`depth` {depth} and `lengths` need {needed} tokens; these models take {most}")
    steps = _Steps(target, draft, batch, depth, max(lengths))
    jobs: list[Callable[[], StepTime]] = [steps.plain, partial(steps.draft, 1), partial(steps.draft, 2)]
    jobs += [partial(steps.check, n + 1) for n in sorted(set(lengths))]
    for job in jobs:  # not counted: the first run sets up what later ones use
        job()
    for _, _, found in interleaved(jobs, rounds):
        yield found


def costs_of(times: Sequence[StepTime]) -> Costs | None:
    """Medians of what was measured so far, None where that is too little for any length.

    Target steps over numbers of drafted tokens in between are interpolated; none goes beyond the longest.
    """
    seconds: dict[tuple[str, int], list[float]] = {}
    for each in times:
        seconds.setdefault((each.kind, each.tokens), []).append(each.seconds)
    found = {step: statistics.median(several) for step, several in seconds.items()}
    sizes = sorted(tokens for kind, tokens in found if kind == "check")
    if not sizes or {("plain", 1), ("draft", 1), ("draft", 2)} - found.keys():
        return None
    sizes, values = [1, *sizes], [found["plain", 1], *(found["check", n] for n in sizes)]
    target = [_between(n, sizes, values) for n in range(1, sizes[-1] + 1)]
    one, two = found["draft", 1], found["draft", 2]
    return Costs(one, target, max(0.0, two - one))


def break_even_rows(costs: Costs, lengths: Sequence[int]) -> list[LengthCost]:
    """A row for each length that was measured; `most_speed_up` is what full acceptance would give."""
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


def _between(n: int, sizes: Sequence[int], values: Sequence[float]) -> float:
    """Linear between the measured sizes."""
    upper = next(i for i, size in enumerate(sizes) if size >= n)
    if sizes[upper] == n:
        return values[upper]
    a, b = sizes[upper - 1], sizes[upper]
    share = (n - a) / (b - a)
    return values[upper - 1] * (1 - share) + values[upper] * share
