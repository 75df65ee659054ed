"""From logits to the next token: greedy, or sampled with temperature, top-k, top-p and min-p."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_surgery.errors import UsageError

__all__ = ["Sampler", "Sampling", "distribution", "draw"]

MIN_TEMPERATURE = 1e-30  # a float32 that can still be divided by


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. `temperature` 0 is greedy. The filters apply in this order, each to the renormalised result
    of the one before: the `top_k` most likely tokens (0: all), the smallest set with `top_p` of the probability,
    tokens at least `min_p` times as likely as the most likely one. `seed` None: different every time."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"`sampling.temperature` {self.temperature}: must be at least 0")
        if self.top_k < 0:
            raise UsageError(f"`sampling.top_k` {self.top_k}: must not be negative")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"`sampling.top_p` {self.top_p}: must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"`sampling.min_p` {self.min_p}: must be between 0 and 1")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise UsageError(f"`sampling.seed` {self.seed}: must be between 0 and 2**63 - 1")


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities float32 [batch, vocab_size] that `sampling` draws from; one-hot where it is greedy.

    logits [batch, vocab_size]. Of equally likely tokens at a filter's edge the lower id stays.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, best, 1.0)
    logits = logits - logits.amax(dim=-1, keepdim=True)
    probabilities = torch.softmax(logits / max(sampling.temperature, MIN_TEMPERATURE), dim=-1)
    if sampling.top_k == 0 and sampling.top_p == 1 and sampling.min_p == 0:
        return probabilities
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ordered.shape[-1], device=ordered.device)
    kept = rank < (sampling.top_k or ordered.shape[-1])
    ordered = _renormalised(ordered, kept)
    if sampling.top_p < 1:  # sums that round to 1 would drop the tail
        ordered = _renormalised(ordered, ordered.cumsum(dim=-1) - ordered < sampling.top_p)
    ordered = _renormalised(ordered, ordered >= sampling.min_p * ordered[..., :1])
    return torch.zeros_like(probabilities).scatter_(-1, tokens, ordered)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Tokens int64 [batch]: the inverse of each row's cumulative distribution at a number in [0, 1).

    probabilities [batch, vocab_size], which need not sum to 1; uniform [batch, 1].
    """
    cumulative = probabilities.cumsum(dim=-1)
    tokens = torch.searchsorted(cumulative, uniform.to(cumulative.device) * cumulative[:, -1:], right=True)
    # Rounding may place the last step past the end, on a token of no probability.
    last = probabilities.shape[-1] - 1 - (probabilities.flip(-1) > 0).int().argmax(dim=-1, keepdim=True)
    return torch.minimum(tokens, last)[:, 0]


def _renormalised(probabilities: Tensor, kept: Tensor) -> Tensor:
    filtered = probabilities * kept
    return filtered / filtered.sum(dim=-1, keepdim=True)


class Sampler:
    """Samples tokens. The same seed and logits give the same tokens on every device."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int64 [batch] and the log-probability of each under the unfiltered model, float32.

        logits [batch, vocab_size].
        """
        if self.sampling.temperature == 0:
            tokens = logits.argmax(dim=-1)
        else:
            tokens = draw(distribution(logits, self.sampling), self.uniform(len(logits), 1))
        log_probabilities = torch.log_softmax(logits.float(), dim=-1).gather(-1, tokens[:, None])
        return tokens, log_probabilities[:, 0]

    def uniform(self, *shape: int) -> Tensor:
        """The next uniform numbers in [0, 1), float32 of that shape, on the CPU."""
        return torch.rand(*shape, generator=self._random)
