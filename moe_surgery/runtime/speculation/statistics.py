"""Statistics of a speculative run: counts by position, seconds of draft and target, bytes of both caches."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Round", "SpeculationStatistics"]


@dataclass(frozen=True, slots=True)
class Round:
    """One target step: new tokens per sequence (none once it has ended), their log-probabilities
    under the unfiltered target, how many tokens were drafted and accepted for each, seconds of both sides.

    `first`: the prompts were read and nothing drafted. With a stop token or the last token allowed, an
    accepted token or the one after may be cut off, so `tokens` can be fewer than accepted + 1.
    """

    tokens: list[list[int]]
    log_probabilities: list[list[float]]
    drafted: list[int]
    accepted: list[int]
    draft_seconds: float
    target_seconds: float
    first: bool = False


@dataclass(slots=True)
class SpeculationStatistics:
    """Sums over the rounds after the prompts were read.

    By position in a draft, from 0: `drafted`, `tried` (all before it were accepted) and `accepted`
    tokens. `target_steps` counts steps, `sequence_steps` steps times the sequences still running;
    `tokens` came out of them. Seconds are per round; cache bytes are of keys and values.
    """

    drafted: list[int] = field(default_factory=list)
    tried: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    target_steps: int = 0
    sequence_steps: int = 0
    tokens: int = 0
    target_seconds: list[float] = field(default_factory=list)
    draft_seconds: list[float] = field(default_factory=list)
    prefill_seconds: float = 0.0
    target_cache_bytes: int = 0
    draft_cache_bytes: int = 0

    def add(self, done: Round) -> None:
        """Count one round."""
        if done.first:
            self.prefill_seconds += done.target_seconds + done.draft_seconds
            return
        self.target_steps += 1
        self.sequence_steps += sum(1 for tokens in done.tokens if tokens)
        self.tokens += sum(map(len, done.tokens))
        self.target_seconds.append(done.target_seconds)
        self.draft_seconds.append(done.draft_seconds)
        for drafted, accepted in zip(done.drafted, done.accepted, strict=True):
            for counts, reached in (
                (self.drafted, drafted),
                (self.tried, min(accepted + 1, drafted)),
                (self.accepted, accepted),
            ):
                counts.extend([0] * (drafted - len(counts)))
                for position in range(reached):
                    counts[position] += 1

    def merge(self, other: SpeculationStatistics) -> None:
        """Add another run's counts; cache bytes take the larger."""
        for counts, added in (
            (self.drafted, other.drafted),
            (self.tried, other.tried),
            (self.accepted, other.accepted),
        ):
            counts.extend([0] * (len(added) - len(counts)))
            counts[: len(added)] = [a + b for a, b in zip(counts, added, strict=False)]
        self.target_steps += other.target_steps
        self.sequence_steps += other.sequence_steps
        self.tokens += other.tokens
        self.target_seconds += other.target_seconds
        self.draft_seconds += other.draft_seconds
        self.prefill_seconds += other.prefill_seconds
        self.target_cache_bytes = max(self.target_cache_bytes, other.target_cache_bytes)
        self.draft_cache_bytes = max(self.draft_cache_bytes, other.draft_cache_bytes)

    @property
    def acceptance(self) -> float | None:
        """Share of the tried tokens that were accepted; None where none was tried."""
        return sum(self.accepted) / sum(self.tried) if any(self.tried) else None

    @property
    def acceptance_by_position(self) -> list[float | None]:
        """The same at each position: the chance of a token, all before it accepted."""
        return [a / t if t else None for a, t in zip(self.accepted, self.tried, strict=True)]

    @property
    def tokens_per_target_step(self) -> float | None:
        """New tokens a sequence gets of one target step; 1 is plain decoding."""
        return self.tokens / self.sequence_steps if self.sequence_steps else None

    def as_dict(self) -> dict[str, object]:
        """For JSON: counts, rates, seconds in all and the median of a round."""
        return {
            "acceptance": self.acceptance,
            "acceptance_by_position": self.acceptance_by_position,
            "tokens_per_target_step": self.tokens_per_target_step,
            "drafted_by_position": list(self.drafted),
            "tried_by_position": list(self.tried),
            "accepted_by_position": list(self.accepted),
            "target_steps": self.target_steps,
            "tokens": self.tokens,
            "prefill_seconds": self.prefill_seconds,
            "target_seconds": sum(self.target_seconds),
            "draft_seconds": sum(self.draft_seconds),
            "target_step_seconds_median": _median(self.target_seconds),
            "draft_round_seconds_median": _median(self.draft_seconds),
            "target_cache_bytes": self.target_cache_bytes,
            "draft_cache_bytes": self.draft_cache_bytes,
        }


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
