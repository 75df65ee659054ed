"""Which drafted tokens are accepted, and the token after them: pure functions of distributions and randomness.

The rule is that of Leviathan, Kalman and Matias (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318): a
token x drawn from the draft's q is accepted with probability min(1, p(x) / q(x)); the first rejected one is
replaced by a token drawn from max(p - q, 0), normalised; if all are accepted, one more is drawn from p. The
output is then distributed as if each token had been drawn from p.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_surgery.runtime.sampling import draw

__all__ = ["accept_greedy", "rejection_sample", "residual"]


def residual(p: Tensor, q: Tensor) -> Tensor:
    """The distribution of a replacement, not normalised: max(p - q, 0) over the last dimension.

    p where that is 0 everywhere: between equal distributions only rounding rejects a token.
    """
    difference = (p - q).clamp(min=0)
    return torch.where(difference.sum(dim=-1, keepdim=True) > 0, difference, p)


def rejection_sample(
    drafted: Tensor, counts: Tensor, q: Tensor, p: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """How many drafted tokens are accepted, int64 [batch], and the token after them, int64 [batch].

    drafted int64 [batch, n], of which row b counts the first counts[b] (int64 [batch]); q float32
    [batch, n, vocab_size], what they were drawn from; p [batch, n + 1, vocab_size], the target's
    distributions after 0 to n of them; uniform [batch, n + 1], independent numbers in [0, 1).
    """
    n = drafted.shape[1]
    index = drafted[..., None]
    target_probs = p[:, :n].gather(-1, index)[..., 0]
    draft_probs = q.gather(-1, index)[..., 0]
    accepted = (uniform[:, :n] * draft_probs < target_probs) & (
        torch.arange(n, device=p.device) < counts[:, None]
    )
    num_accepted = accepted.long().cumprod(dim=1).sum(dim=1)
    row = torch.arange(len(p), device=p.device)
    next_probs = p[row, num_accepted]
    if n:
        replacement = residual(next_probs, q[row, num_accepted.clamp(max=n - 1)])
        next_probs = torch.where((num_accepted < counts)[:, None], replacement, next_probs)
    return num_accepted, draw(next_probs, uniform[:, n:])


def accept_greedy(drafted: Tensor, counts: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """`rejection_sample` at temperature 0: a drafted token is accepted where it is the target's most likely.

    drafted int64 [batch, n], counts int64 [batch], the target's logits [batch, n + 1, vocab_size].
    """
    n = drafted.shape[1]
    best = logits.argmax(dim=-1)
    accepted = (drafted == best[:, :n]) & (torch.arange(n, device=best.device) < counts[:, None])
    num_accepted = accepted.long().cumprod(dim=1).sum(dim=1)
    return num_accepted, best.gather(1, num_accepted[:, None])[:, 0]
