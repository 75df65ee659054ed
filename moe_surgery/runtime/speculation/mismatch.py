"""How often speculation gives other tokens than plain decoding, where a step's size changes its rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_surgery.runtime.generate import generate
from moe_surgery.runtime.model import Model
from moe_surgery.runtime.speculation.draft_length import AdaptiveLength
from moe_surgery.runtime.speculation.speculate import DEFAULT_LENGTH, speculate

__all__ = ["Mismatch", "compare_tokens", "greedy_mismatch"]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Outputs compared token by token. `first[i]` is where output i first differs, None if nowhere.

    After a first difference texts go their own ways, so the tokens up to it are what a rate is of:
    `rate` is differences per token compared up to and including each first one.
    """

    first: tuple[int | None, ...]
    compared: int

    @property
    def differing(self) -> int:
        """Outputs that differ somewhere."""
        return sum(place is not None for place in self.first)

    @property
    def rate(self) -> float:
        return self.differing / self.compared if self.compared else 0.0

    def as_dict(self) -> dict[str, object]:
        return {
            "outputs": len(self.first),
            "differing_outputs": self.differing,
            "tokens_compared": self.compared,
            "differences_per_token": self.rate,
            "first_difference": list(self.first),
        }


def compare_tokens(plain: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> Mismatch:
    """Where each of `other` first differs from `plain`; one that ends early differs at its end."""
    first: list[int | None] = []
    compared = 0
    for a, b in zip(plain, other, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        differs = list(a) != list(b)
        first.append(same if differs else None)
        compared += same + differs
    return Mismatch(tuple(first), compared)


def greedy_mismatch(
    target: Model,
    draft: Model,
    prompts: Sequence[Sequence[int]],
    *,
    length: int | AdaptiveLength = DEFAULT_LENGTH,
    max_new_tokens: int = 64,
    batch: int = 1,
) -> Mismatch:
    """Greedy speculation against plain greedy decoding of each prompt, `batch` prompts at a time.

    No difference is expected in float32 and with kernels whose result for a token does not depend on
    the others in the step; elsewhere (BF16) rounding can turn the choice between near equals.
    """
    plain: list[list[int]] = []
    other: list[list[int]] = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        plain += generate(target, some, max_new_tokens=max_new_tokens).tokens
        other += speculate(target, draft, some, length=length, max_new_tokens=max_new_tokens).tokens
    return compare_tokens(plain, other)
