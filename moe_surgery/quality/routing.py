"""How a router chooses: what `search` needs to know to leave experts out without running the model again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from moe_surgery.errors import InvalidInputError
from moe_surgery.families.grouping import Grouping

__all__ = ["Routing", "recognised"]

CHECKED_TOKENS = 2048
_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: torch.softmax(logits, dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: torch.nn.functional.softplus(logits).sqrt(),
}


@dataclass(frozen=True, slots=True)
class Routing:
    """The router's scores of some tokens, float32 [tokens, experts], and the rule that chooses by them.

    A token goes to its `top_k` experts of largest score, plus `bias` [experts] where there is one; with `grouping`
    to those in its best groups. Routing weights are their scores times `scale`, divided by their sum if
    `renormalised`. `softmax`: scores of the remaining experts are divided by their sum first, as a pruned
    router's softmax does.
    """

    scores: Tensor
    top_k: int
    bias: Tensor | None = None
    softmax: bool = True
    renormalised: bool = True
    scale: float = 1.0
    grouping: Grouping | None = None

    @property
    def fixed_order(self) -> bool:
        """Whether a token's order of experts does not depend on which remain."""
        return self.grouping is None and (self.bias is None or not self.softmax)

    @property
    def local(self) -> bool:
        """Whether leaving out an expert changes nothing for tokens that do not go to it."""
        return self.fixed_order and (self.renormalised or not self.softmax)

    @property
    def fewest(self) -> int:
        """The fewest experts of a layer that the rule can choose from."""
        if self.grouping is None:
            return 1
        counts = range(1, self.scores.shape[1] + 1)
        return next(n for n in counts if self.grouping.problem_of_count(n, self.top_k) is None)

    def choose(self, remaining: Tensor, most: int | None = None) -> Tensor:
        """The best `most` (default: top_k) experts of each token among `remaining`, bool [experts] or
        [tokens, experts]; int64 [tokens, at most `most`], best first."""
        remaining = remaining.expand_as(self.scores)
        chosen = self.scores
        if self.bias is not None:
            chosen = (chosen / self._total(remaining) if self.softmax else chosen) + self.bias
        chosen = chosen.masked_fill(~remaining, -torch.inf)
        if self.grouping is not None:
            groups = chosen.view(len(chosen), self.grouping.groups, -1)
            best = groups.topk(min(self.grouping.minimum, groups.shape[-1]), dim=-1).values.sum(dim=-1)
            used = torch.zeros_like(best, dtype=torch.bool)
            used.scatter_(1, best.topk(self.grouping.used, dim=-1).indices, True)
            chosen = groups.masked_fill(~used[..., None], -torch.inf).flatten(1)
        count = min(self.top_k if most is None else most, int(remaining.sum(dim=1).min()))
        return chosen.topk(count, dim=1).indices

    def weights(self, ids: Tensor, remaining: Tensor) -> Tensor:
        """Routing weights [tokens, experts] of the chosen `ids` among `remaining` (as for `choose`)."""
        chosen = self.scores.gather(1, ids)
        if self.renormalised:
            chosen = chosen / chosen.sum(dim=1, keepdim=True)
        elif self.softmax:
            chosen = chosen / self._total(remaining.expand_as(self.scores))
        return torch.zeros_like(self.scores).scatter_(1, ids, chosen * self.scale)

    def droppable(self, remaining: Tensor) -> Tensor:
        """Which of the experts `remaining` may be left out next, bool [experts]: with groups those of the fullest."""
        if self.grouping is None:
            return remaining
        groups = remaining.view(self.grouping.groups, -1)
        fullest = groups.sum(dim=1) == groups.sum(dim=1).max()
        return (groups & fullest[:, None]).flatten()

    def _total(self, remaining: Tensor) -> Tensor:
        """The sum of the remaining scores, [tokens, 1]."""
        return (self.scores * remaining).sum(dim=1, keepdim=True)


def recognised(
    logits: Tensor,
    bias: Tensor | None,
    grouping: Grouping | None,
    ids: Tensor,
    weights: Tensor,
    tolerance: float,
    where: str,
) -> Routing:
    """The rule that gives the router's own `ids` and `weights` [tokens, top_k] from its `logits` [tokens, experts].

    The known ones are tried: softmax, sigmoid or sqrt(softplus), renormalised or not, with any constant factor;
    `tolerance` is that of the weights. Raises InvalidInputError, naming the layer `where`, if none fits.
    """
    few = slice(0, CHECKED_TOKENS)
    everything = torch.ones(logits.shape[1], dtype=torch.bool)
    for name, renormalised in product(_SCORES, (True, False)):
        scores = _SCORES[name](logits.float())
        softmax = name == "softmax"
        rule = Routing(scores[few], ids.shape[1], bias, softmax, renormalised, 1.0, grouping)
        found = rule.weights(rule.choose(everything), everything)
        expected = torch.zeros_like(found).scatter_(1, ids[few], weights[few].float())
        scale = float((expected.sum() / found.sum()).item())
        fits = (found * scale - expected).abs().amax(dim=1) <= tolerance * expected.abs().amax(dim=1)
        if float(fits.float().mean()) >= 1 - tolerance:
            return Routing(scores, ids.shape[1], bias, softmax, renormalised, scale, grouping)
    raise InvalidInputError(
        f"{where}: its router is not of a kind that search knows; rank by statistics instead (profile, then rank)"
    )
