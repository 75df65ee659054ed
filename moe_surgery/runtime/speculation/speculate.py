"""Speculative decoding: a draft proposes, the target verifies several tokens in one step.

Greedy output is the target's, token for token, with batch-invariant kernels; with others a near tie can go the
other way. Sampled output has the target's distribution.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_surgery.errors import UsageError
from moe_surgery.kernels.interface import SHORT_STEP
from moe_surgery.runtime.generate import clamp_new_tokens, decoder, pad_left
from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.sampling import Sampler, Sampling, distribution
from moe_surgery.runtime.speculation.acceptance import accept_greedy, rejection_sample
from moe_surgery.runtime.speculation.draft import DRAFT_LAG, Drafter, Proposal
from moe_surgery.runtime.speculation.draft_length import AdaptiveLength, LengthControl
from moe_surgery.runtime.speculation.statistics import Round, SpeculationStatistics
from moe_surgery.runtime.step_bytes import cache_bytes, counted_costs

__all__ = [
    "DEFAULT_DRAFT_LENGTH",
    "Speculated",
    "Speculation",
    "check_pair",
    "speculate",
    "speculation_cache_bytes",
]

DEFAULT_DRAFT_LENGTH = 4


@dataclass(frozen=True, slots=True)
class Speculated:
    """New tokens per sequence, the stop token included where one was met, their log-probabilities
    under the unfiltered target, and what speculation did."""

    tokens: list[list[int]]
    log_probabilities: list[list[float]]
    statistics: SpeculationStatistics


class Speculation:
    """One run: iterate over it for its rounds; `statistics` and `tokens` grow with each."""

    def __init__(
        self,
        target: CausalLM,
        draft: CausalLM,
        prompts: Sequence[Sequence[int]],
        *,
        draft_length: int | AdaptiveLength = DEFAULT_DRAFT_LENGTH,
        sampling: Sampling | None = None,
        max_new_tokens: int = 256,
        stop_tokens: Sequence[int] | None = None,
        context: int | None = None,
    ) -> None:
        """See `speculate`."""
        check_pair(target, draft)
        self._ids, self._mask = pad_left(prompts)
        tokens = self._ids.shape[1]
        self._new = clamp_new_tokens(target, tokens, max_new_tokens, context)
        needed = tokens + self._new - 1  # the last token is never fed back
        if needed > (most := draft.config.max_position_embeddings):
            raise UsageError(
                f"the draft takes {most} tokens, but prompt and answer may reach {needed + 1}; pass `context` {most}"
            )
        costs = None
        if isinstance(draft_length, AdaptiveLength) and draft_length.costs is None:
            costs = counted_costs(target, draft, len(prompts), draft_length.max_length)
        self._control = LengthControl(draft_length, costs)
        # Rejected tokens are past the last accepted one until they are rolled back.
        self._context = min(needed + self._control.max_length, target.config.max_position_embeddings)
        self._draft_context = min(needed + self._control.max_length, draft.config.max_position_embeddings)
        stops = target.config.eos_token_ids if stop_tokens is None else stop_tokens
        self._stops = torch.tensor(stops, dtype=torch.int64)
        self._sampler = Sampler(sampling or Sampling())
        self._target = target
        self._drafter = Drafter(draft, self._sampler, self._stops, self._control.confidence)
        self._prompts = [list(p) for p in prompts]
        self._sequences = [list(p) for p in prompts]
        self._log_probabilities: list[list[float]] = [[] for _ in prompts]
        self._ended = [False] * len(prompts)
        self.statistics = SpeculationStatistics()

    @property
    def tokens(self) -> list[list[int]]:
        """New tokens of each sequence so far."""
        return [s[len(p) :] for s, p in zip(self._sequences, self._prompts, strict=True)]

    @property
    def log_probabilities(self) -> list[list[float]]:
        """Log-probabilities of `tokens` under the unfiltered target."""
        return [list(values) for values in self._log_probabilities]

    def __iter__(self) -> Iterator[Round]:
        """Read the prompts and yield round after round until every sequence has ended."""
        yield self._counted(self._prefill())
        if not all(self._ended):
            self._prefill_draft()
        while not all(self._ended):
            yield self._counted(self._round())

    def _counted(self, done: Round) -> Round:
        self.statistics.add(done)
        return done

    @torch.inference_mode()
    def _prefill(self) -> Round:
        """The first token of each sequence comes from the target alone."""
        start = time.perf_counter()
        target = self._target
        self._cache = target.new_cache(len(self._ids), self._context, rollback=self._control.max_length)
        self._step: Callable[[Tensor], Tensor] | None = None
        self.statistics.target_cache_bytes = self._cache.nbytes
        logits = target(self._ids, self._cache, self._mask.to(target.device), logits_to_keep=1)
        tokens, log_probabilities = self._sampler(logits[:, -1])
        new = [[t] for t in tokens.tolist()]
        appended = self._append(new, [[v] for v in log_probabilities.tolist()])
        none = [0] * len(new)
        return Round(*appended, none, none, 0.0, time.perf_counter() - start, first=True)

    @torch.inference_mode()
    def _prefill_draft(self) -> None:
        start = time.perf_counter()
        self._drafter.prefill(self._ids, self._mask, self._draft_context, self._control.max_length)
        self.statistics.draft_cache_bytes = self._drafter.cache.nbytes
        lengths = [0 if e else n for n, e in zip(self._cache.lengths, self._ended, strict=True)]
        self._cache.truncate(lengths)
        self._drafter.truncate(lengths)
        self.statistics.prefill_seconds += time.perf_counter() - start

    @torch.inference_mode()
    def _round(self) -> Round:
        start = time.perf_counter()
        proposal = self._propose()
        drafted = time.perf_counter()
        logits = self._verify(proposal)
        num_accepted, next_tokens = self._accept(proposal, logits)
        log_probabilities = torch.log_softmax(logits, dim=-1)
        n = proposal.tokens.shape[1]
        slots = torch.arange(n + 1, device=logits.device)
        padded = torch.cat((proposal.tokens.to(logits.device), next_tokens[:, None]), dim=1)
        tokens = torch.where(slots == num_accepted[:, None], next_tokens[:, None], padded)
        values = log_probabilities.gather(-1, tokens[..., None])[..., 0].tolist()
        accepted = num_accepted.tolist()
        live = [not ended for ended in self._ended]
        new = [row[: a + 1] if on else [] for row, a, on in zip(tokens.tolist(), accepted, live, strict=True)]
        counts = [n if on else 0 for n, on in zip(proposal.counts, live, strict=True)]
        accepted = [a if on else 0 for a, on in zip(accepted, live, strict=True)]
        appended = self._append(new, [v[: len(t)] for v, t in zip(values, new, strict=True)])
        self._control.observe(counts, accepted)
        # Roll back what was rejected, and sequences that have ended.
        lengths = [
            0 if ended else length - n + a
            for length, a, ended in zip(self._cache.lengths, accepted, self._ended, strict=True)
        ]
        self._cache.truncate(lengths)
        self._drafter.truncate(lengths)
        stop = time.perf_counter()
        return Round(*appended, counts, accepted, drafted - start, stop - drafted)

    def _propose(self) -> Proposal:
        """Draft as many tokens as the rule allows, the context holds, and each sequence may still use."""
        lengths = self._cache.lengths
        free = min(self._context, self._draft_context) - 1 - max(lengths)
        most = min(self._control.next(), free)
        remaining = [self._new - len(s) + len(p) for s, p in zip(self._sequences, self._prompts, strict=True)]
        limits = [0 if ended else min(most, n - 1) for n, ended in zip(remaining, self._ended, strict=True)]
        if max(limits) == 0:
            empty = torch.zeros(len(limits), 0, dtype=torch.int64, device=self._target.device)
            return Proposal(empty, limits, None)
        return self._drafter.propose(self._sequences, lengths, limits)

    def _verify(self, proposal: Proposal) -> Tensor:
        """The target's logits [batch, n + 1, vocab_size] after the last token and each drafted one."""
        last = [0 if e else s[-1] for s, e in zip(self._sequences, self._ended, strict=True)]
        before = torch.tensor(last, dtype=torch.int64)
        if proposal.tokens.shape == (1, 0):
            self._step = self._step or decoder(self._target, self._cache)
            return self._step(before)
        drafted = proposal.tokens.to(self._target.device)
        step = torch.cat((before[:, None].to(drafted.device), drafted), dim=1)
        # A long step may round otherwise than the steps of one token that generation without a draft takes.
        parts = [self._target(part, self._cache) for part in torch.split(step, SHORT_STEP, dim=1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _accept(self, proposal: Proposal, logits: Tensor) -> tuple[Tensor, Tensor]:
        """How many drafted tokens are accepted, and the token after them, int64 [batch] each."""
        drafted = proposal.tokens.to(logits.device)
        counts = torch.tensor(proposal.counts, device=logits.device)
        sampling = self._sampler.sampling
        if sampling.temperature == 0:
            return accept_greedy(drafted, counts, logits)
        p = distribution(logits.flatten(0, 1), sampling).view(logits.shape)
        q = p[:, :0] if proposal.distributions is None else proposal.distributions.to(p.device)
        uniform = self._sampler.uniform(len(drafted), drafted.shape[1] + 1).to(p.device)
        return rejection_sample(drafted, counts, q, p, uniform)

    def _append(
        self, new: list[list[int]], log_probabilities: list[list[float]]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Append each sequence's new tokens up to its stop token or limit; returns what was appended."""
        stops = set(self._stops.tolist())
        for row, tokens in enumerate(new):
            if self._ended[row]:
                continue
            ends = [i for i, token in enumerate(tokens) if token in stops][:1]
            del tokens[ends[0] + 1 if ends else len(tokens) :]
            del log_probabilities[row][len(tokens) :]
            self._sequences[row] += tokens
            self._log_probabilities[row] += log_probabilities[row]
            full = len(self._sequences[row]) - len(self._prompts[row]) >= self._new
            self._ended[row] = bool(ends) or full
        return new, log_probabilities


def check_pair(target: CausalLM, draft: CausalLM) -> None:
    """Raise UsageError unless `draft` can draft for `target`."""
    if draft.config.vocab_size != target.config.vocab_size:
        raise UsageError(
            f"the draft has a vocabulary of {draft.config.vocab_size}, the target one of "
            f"{target.config.vocab_size}; draft with a model of the same tokenizer"
        )


def speculation_cache_bytes(
    target: CausalLM, draft: CausalLM, batch: int, tokens: int, length: int
) -> tuple[int, int]:
    """Bytes of the target's and the draft's keys and values for `batch` sequences of `tokens` tokens, prompt
    and answer together: rings hold the rollback too, and drafted tokens go past the last one."""
    cached = tokens - 1 + length  # the last token is never fed back
    return (
        cache_bytes(target, batch, min(cached, target.config.max_position_embeddings), length),
        cache_bytes(draft, batch, min(cached, draft.config.max_position_embeddings), length + DRAFT_LAG),
    )


def speculate(
    target: CausalLM,
    draft: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    draft_length: int | AdaptiveLength = DEFAULT_DRAFT_LENGTH,
    sampling: Sampling | None = None,
    max_new_tokens: int = 256,
    stop_tokens: Sequence[int] | None = None,
    context: int | None = None,
    callback: Callable[[Round], None] | None = None,
) -> Speculated:
    """Generate with `target`, `draft` proposing `draft_length` tokens a round: a number, or the best one (at least 1).

    `draft` is another checkpoint's model, or a `view` of the target, which adds no weights. Both
    sample by `sampling`. Other arguments are those of `generate`; `callback` receives each round (iterate over
    a `Speculation` for a stream).

    Raises UsageError for models of different vocabularies, a prompt that does not fit, or a draft length
    out of range.
    """
    run = Speculation(
        target,
        draft,
        prompts,
        draft_length=draft_length,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        context=context,
    )
    for done in run:
        if callback:
            callback(done)
    return Speculated(run.tokens, run.log_probabilities, run.statistics)
