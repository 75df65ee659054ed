"""Which drafted tokens stay, and what follows them: pure functions of distributions and random numbers.

The rule is that of Leviathan, Kalman and Matias (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318): a
token x drawn from the draft's q stays with probability min(1, p(x) / q(x)); the first that does not is
replaced by one drawn from max(p - q, 0), made to sum to 1; if all stay, one more is drawn from p. The tokens
that come out are then distributed as if each had been drawn from p.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_surgery.runtime.sampling import draw

__all__ = ["accept_drawn", "accept_greedy", "residual"]


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What a replacement is drawn from, not made to sum to 1: max(p - q, 0) over the last dimension.

    Where rounding leaves nothing of it, p: two distributions that equal each other reject nothing else.
    """
    left = (p - q).clamp(min=0)
    return torch.where(left.sum(dim=-1, keepdim=True) > 0, left, p)


def accept_drawn(
    drafted: Tensor, counts: Tensor, q: Tensor, p: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """How many drafted tokens stay, int64 [batch], and the token after them, int64 [batch].

    drafted int64 [batch, n], of which row b counts the first counts[b] (int64 [batch]); q float32
    [batch, n, vocabulary], what they were drawn from; p [batch, n + 1, vocabulary], the target's
    distributions after 0 to n of them; uniform [batch, n + 1], independent numbers in [0, 1).
    """
    n = drafted.shape[1]
    chosen = drafted[..., None]
    likely = p[:, :n].gather(-1, chosen)[..., 0]
    drawn_with = q.gather(-1, chosen)[..., 0]
    stays = (uniform[:, :n] * drawn_with < likely) & (torch.arange(n, device=p.device) < counts[:, None])
    kept = stays.long().cumprod(dim=1).sum(dim=1)
    row = torch.arange(len(p), device=p.device)
    after = p[row, kept]
    if n:
        replaced = residual(after, q[row, kept.clamp(max=n - 1)])
        after = torch.where((kept < counts)[:, None], replaced, after)
    return kept, draw(after, uniform[:, n:])


def accept_greedy(drafted: Tensor, counts: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """`accept_drawn` at temperature 0: a drafted token stays where it is the target's likeliest.

    drafted int64 [batch, n], counts int64 [batch], the target's logits [batch, n + 1, vocabulary].
    """
    n = drafted.shape[1]
    best = logits.argmax(dim=-1)
    stays = (drafted == best[:, :n]) & (torch.arange(n, device=best.device) < counts[:, None])
    kept = stays.long().cumprod(dim=1).sum(dim=1)
    return kept, best.gather(1, kept[:, None])[:, 0]
