"""The draft's side of speculative decoding: its cache, and the tokens it proposes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_surgery.runtime.generate import decoder
from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.sampling import Sampler, distribution, draw

__all__ = ["Drafter", "Proposal"]

# Columns that the draft may be behind the target, beside those it takes back: see `Drafter.propose`.
BEHIND = 2


@dataclass(frozen=True, slots=True)
class Proposal:
    """Drafted tokens int64 [batch, n], how many of them count for each sequence, and what they were
    drawn from, float32 [batch, n, vocabulary] (None where drafting is greedy)."""

    tokens: Tensor
    counts: list[int]
    distributions: Tensor | None


class Drafter:
    """A draft model that follows a batch of sequences, its cache a prefix of each."""

    def __init__(self, model: CausalLM, sampler: Sampler, stops: Tensor, confidence: float) -> None:
        """`stops` int64 on the CPU: nothing is drafted after one. `confidence`: see `AdaptiveLength`."""
        self._model, self._sampler = model, sampler
        self._stops, self._confidence = stops, confidence
        self._step: Callable[[Tensor], Tensor] | None = None

    @torch.inference_mode()
    def prefill(self, ids: Tensor, mask: Tensor | None, context: int, most: int) -> None:
        """Read the prompts, int64 [batch, tokens], into a cache of `context` columns."""
        self.cache = self._model.new_cache(len(ids), context, rollback=most + BEHIND)
        self._model(ids, self.cache, None if mask is None else mask.to(self._model.device), logits_to_keep=0)

    @torch.inference_mode()
    def propose(
        self, sequences: Sequence[Sequence[int]], lengths: Sequence[int], limits: Sequence[int]
    ) -> Proposal:
        """Draft up to limits[b] tokens for sequence b; at least one limit is above 0.

        `sequences` are the tokens so far; lengths[b] of their columns (padding included) are in the
        target's cache, all but the last token's. Rows of length 0 have ended: they are carried along.

        The draft's cache lacks the last token too, and one more where the round before accepted all
        of its tokens: the last drafted one was never fed back. Every row is fed as many as the row
        that lacks most; the others take back what they know.
        """
        cache = self.cache
        live = [n > 0 for n in lengths]
        behind = max(n + 1 - held for n, held in zip(lengths, cache.lengths, strict=True) if n)
        cache.truncate([n + 1 - behind if n else 0 for n in lengths])
        tails = [list(s[-behind:]) if on else [0] * behind for s, on in zip(sequences, live, strict=True)]
        logits = self._logits(torch.tensor(tails, dtype=torch.int64))
        drafting = torch.tensor(limits) > 0
        tokens: list[Tensor] = []
        distributions: list[Tensor] = []
        counts = torch.zeros(len(limits), dtype=torch.int64)
        while True:
            drafting &= self._sure(logits)
            if not drafting.any():
                break
            drawn = self._drawn(logits, distributions)
            tokens.append(drawn)
            counts += drafting
            drafting &= (counts < torch.tensor(limits)) & ~torch.isin(drawn.cpu(), self._stops)
            if not drafting.any():
                break
            logits = self._logits(drawn[:, None])
        drafted = (
            torch.stack(tokens, dim=1) if tokens else logits.new_zeros(len(logits), 0, dtype=torch.int64)
        )
        q = torch.stack(distributions, dim=1) if distributions else None
        return Proposal(drafted, counts.tolist(), q)

    def follow(self, lengths: Sequence[int]) -> None:
        """The target's cache now has `lengths` columns, 0 where a sequence has ended: forget what is beyond."""
        self.cache.truncate(list(map(min, lengths, self.cache.lengths)))

    def _logits(self, ids: Tensor) -> Tensor:
        """Next-token logits [batch, vocabulary] after feeding ids [batch, columns]."""
        if ids.shape == (1, 1):  # a batch becomes ragged, which a captured step does not know
            self._step = self._step or decoder(self._model, self.cache)
            return self._step(ids[:, 0])[:, -1]
        return self._model(ids, self.cache, logits_to_keep=1)[:, -1]

    def _sure(self, logits: Tensor) -> Tensor:
        """Which rows are sure enough of their next token, bool [batch] on the CPU."""
        if not self._confidence:
            return torch.ones(len(logits), dtype=torch.bool)
        return (torch.softmax(logits, dim=-1).amax(dim=-1) >= self._confidence).cpu()

    def _drawn(self, logits: Tensor, distributions: list[Tensor]) -> Tensor:
        """The next tokens, int64 [batch]; what they were drawn from is added to `distributions`."""
        sampling = self._sampler.sampling
        if sampling.temperature == 0:
            return logits.argmax(dim=-1)
        distributions.append(distribution(logits, sampling))
        return draw(distributions[-1], self._sampler.uniform(len(logits), 1))
