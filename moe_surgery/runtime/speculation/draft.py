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

# Tokens that the draft's cache may lag behind the target's, besides those it rolls back: see `Drafter.propose`.
DRAFT_LAG = 2


@dataclass(frozen=True, slots=True)
class Proposal:
    """Drafted tokens int64 [batch, n], how many of them count for each sequence, and their
    distributions, float32 [batch, n, vocab_size] (None where drafting is greedy)."""

    tokens: Tensor
    counts: list[int]
    distributions: Tensor | None


class Drafter:
    """A draft model and its cache, which holds a prefix of each sequence of the batch."""

    def __init__(self, model: CausalLM, sampler: Sampler, stops: Tensor, confidence: float) -> None:
        """`stops` int64 on the CPU: nothing is drafted after one. `confidence`: see `AdaptiveLength`."""
        self._model, self._sampler = model, sampler
        self._stops, self._confidence = stops, confidence
        self._step: Callable[[Tensor], Tensor] | None = None

    @torch.inference_mode()
    def prefill(self, ids: Tensor, mask: Tensor | None, context: int, max_length: int) -> None:
        """Read the prompts, int64 [batch, tokens], into a cache of `context` tokens."""
        self.cache = self._model.new_cache(len(ids), context, rollback=max_length + DRAFT_LAG)
        self._model(ids, self.cache, None if mask is None else mask.to(self._model.device), logits_to_keep=0)

    @torch.inference_mode()
    def propose(
        self, sequences: Sequence[Sequence[int]], lengths: Sequence[int], limits: Sequence[int]
    ) -> Proposal:
        """Draft up to limits[b] tokens for sequence b; at least one limit is above 0.

        `sequences` are the tokens so far; lengths[b] of them (padding included) are in the target's cache,
        all but the last. Rows of length 0 have ended: they stay in the batch.

        The draft's cache lacks the last token too, and one more where the previous round accepted all of its
        tokens: the last drafted one was never fed back. Every row is fed as many tokens as the row that lacks
        most; the others roll back first.
        """
        cache = self.cache
        live = [n > 0 for n in lengths]
        behind = max(n + 1 - cached for n, cached in zip(lengths, cache.lengths, strict=True) if n)
        cache.truncate([n + 1 - behind if n else 0 for n in lengths])
        tails = [list(s[-behind:]) if on else [0] * behind for s, on in zip(sequences, live, strict=True)]
        logits = self._logits(torch.tensor(tails, dtype=torch.int64))
        drafting = torch.tensor(limits) > 0
        tokens: list[Tensor] = []
        distributions: list[Tensor] = []
        counts = torch.zeros(len(limits), dtype=torch.int64)
        while True:
            drafting &= self._confident(logits)
            if not drafting.any():
                break
            sampled = self._draw(logits, distributions)
            tokens.append(sampled)
            counts += drafting
            drafting &= (counts < torch.tensor(limits)) & ~torch.isin(sampled.cpu(), self._stops)
            if not drafting.any():
                break
            logits = self._logits(sampled[:, None])
        drafted = (
            torch.stack(tokens, dim=1) if tokens else logits.new_zeros(len(logits), 0, dtype=torch.int64)
        )
        q = torch.stack(distributions, dim=1) if distributions else None
        return Proposal(drafted, counts.tolist(), q)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Drop what is beyond `lengths` tokens of the target's cache, 0 where a sequence has ended."""
        self.cache.truncate(list(map(min, lengths, self.cache.lengths)))

    def _logits(self, ids: Tensor) -> Tensor:
        """Next-token logits [batch, vocab_size] after feeding ids [batch, tokens]."""
        if ids.shape == (1, 1):  # batches become ragged, which a captured step does not support
            self._step = self._step or decoder(self._model, self.cache)
            return self._step(ids[:, 0])[:, -1]
        return self._model(ids, self.cache, logits_to_keep=1)[:, -1]

    def _confident(self, logits: Tensor) -> Tensor:
        """Which rows reach the confidence for their next token, bool [batch] on the CPU."""
        if not self._confidence:
            return torch.ones(len(logits), dtype=torch.bool)
        return (torch.softmax(logits, dim=-1).amax(dim=-1) >= self._confidence).cpu()

    def _draw(self, logits: Tensor, distributions: list[Tensor]) -> Tensor:
        """The next tokens, int64 [batch], their distributions appended to `distributions`."""
        sampling = self._sampler.sampling
        if sampling.temperature == 0:
            return logits.argmax(dim=-1)
        distributions.append(distribution(logits, sampling))
        return draw(distributions[-1], self._sampler.uniform(len(logits), 1))
