"""How many tokens to draft: a fixed number, or the best for the acceptance and costs measured so far.

If each drafted token is accepted with probability a, independently, a target step over n drafted tokens
yields (1 - a^(n+1)) / (1 - a) tokens (Leviathan, Kalman and Matias, arXiv 2211.17192, equation 1). Where one
draft step costs d and a target step over n drafted tokens t_n, a token costs (n d + t_n) over that; plain
decoding costs t_0 per token. Where all n were accepted (probability a^n) the draft has not seen the last one:
its next step takes two tokens, which costs c more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_surgery.errors import UsageError

__all__ = [
    "MAX_DRAFT_LENGTH",
    "AdaptiveLength",
    "Costs",
    "LengthControl",
    "best_length",
    "break_even",
    "check_length",
    "expected_tokens",
    "speed_up",
]

MAX_DRAFT_LENGTH = 64
HALVINGS = 60


@dataclass(frozen=True, slots=True)
class Costs:
    """Cost of one draft step, and of a target step over 0, 1, 2, ... drafted tokens, in the same unit;
    `catch_up` is what a draft step over two tokens costs more than one over one."""

    draft: float
    target: Sequence[float]
    catch_up: float = 0.0


@dataclass(frozen=True, slots=True)
class AdaptiveLength:
    """At most `max_length` tokens; fewer where the draft is unsure or acceptance does not pay for more.

    Drafting stops where the draft's distribution (unfiltered, at temperature 1) has no token with a probability
    of at least `confidence`. That depends only on the tokens before it, so the output stays the target's. The
    length, at least 1, is the best for the acceptance measured so far: an average that starts at `acceptance`
    and decays by the factor `memory` each round. `costs` None: estimated from the bytes that steps read.
    """

    max_length: int = 8
    confidence: float = 0.3
    memory: float = 0.9
    acceptance: float = 0.8
    costs: Costs | None = None

    def __post_init__(self) -> None:
        check_length(self.max_length)
        for name in ("confidence", "memory", "acceptance"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise UsageError(f"adaptive draft length: {name} {value}: must be between 0 and 1")
        if self.costs is not None and len(self.costs.target) <= self.max_length:
            raise UsageError(
                f"adaptive draft length: costs of {len(self.costs.target)} target steps; needed for 0 to "
                f"{self.max_length} drafted tokens"
            )


def check_length(length: int, parameter: str = "draft_length", other: str = ", or auto") -> None:
    """Raise UsageError unless 1 <= length <= MAX_DRAFT_LENGTH."""
    if not 1 <= length <= MAX_DRAFT_LENGTH:
        raise UsageError(f"`{parameter}` {length}: must be 1 to {MAX_DRAFT_LENGTH}{other}")


def expected_tokens(acceptance: float, length: int) -> float:
    """Tokens a target step yields on average over `length` drafted ones: 1 + a + ... + a^length."""
    return float(sum(acceptance**i for i in range(length + 1)))


def speed_up(acceptance: float, length: int, costs: Costs) -> float:
    """How many times faster than plain decoding: E tokens t_0 / (n d + a^n c + t_n) (theorem 3.8, with t_n for 1
    and c for 0)."""
    spent = length * costs.draft + acceptance**length * costs.catch_up + costs.target[length]
    return expected_tokens(acceptance, length) * costs.target[0] / spent


def best_length(acceptance: float, costs: Costs, max_length: int) -> int:
    """The length from 1 to `max_length` with the greatest speed-up, the shortest of equal ones."""
    return max(range(1, max_length + 1), key=lambda n: (speed_up(acceptance, n, costs), -n))


def break_even(length: int, costs: Costs) -> float | None:
    """The acceptance at which drafting `length` tokens is as fast as plain decoding; None if it never is."""
    if speed_up(1.0, length, costs) < 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):  # the speed-up grows with acceptance
        middle = (low + high) / 2
        low, high = (low, middle) if speed_up(middle, length, costs) >= 1 else (middle, high)
    return high


class LengthControl:
    """The length of each round, adapted to the acceptance in the rounds before."""

    def __init__(self, length: int | AdaptiveLength, costs: Costs | None = None) -> None:
        """`costs` are used where an adaptive length has none. Raises UsageError for a length out of range."""
        if isinstance(length, int):
            check_length(length)
        self._rule = length
        self._costs = length.costs or costs if isinstance(length, AdaptiveLength) else None
        self._tried = self._accepted = 0.0
        if isinstance(length, AdaptiveLength):
            # Weighs as much as one round, so that the first rounds already count.
            self._tried, self._accepted = float(length.max_length), length.acceptance * length.max_length

    @property
    def max_length(self) -> int:
        return self._rule if isinstance(self._rule, int) else self._rule.max_length

    @property
    def confidence(self) -> float:
        """The probability below which drafting stops; 0: never."""
        return 0.0 if isinstance(self._rule, int) else self._rule.confidence

    @property
    def acceptance(self) -> float | None:
        """The estimate, None for a fixed length."""
        return self._accepted / self._tried if self._tried else None

    def next(self) -> int:
        """How many tokens to draft now, 1 to `max_length`."""
        if isinstance(self._rule, int) or self.acceptance is None:
            return self.max_length
        if self._costs is None:
            return self.max_length
        return best_length(self.acceptance, self._costs, self.max_length)

    def observe(self, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """Count a round by sequence: tokens after a rejected one were not tried."""
        if isinstance(self._rule, int):
            return
        tried = sum(min(a + 1, n) for n, a in zip(drafted, accepted, strict=True))
        self._tried = self._rule.memory * self._tried + tried
        self._accepted = self._rule.memory * self._accepted + sum(accepted)
