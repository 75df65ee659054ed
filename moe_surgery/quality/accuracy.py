"""How many questions a model answers right, and whether that differs from the full model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Accuracy", "compare", "mcnemar", "wilson"]

Z95 = 1.959963984540054
"""The 97.5th percentile of the standard normal distribution."""


def wilson(right: int, questions: int) -> tuple[float, float]:
    """The 95% confidence interval of the share `right / questions`.

    Wilson's score interval (E. B. Wilson, Probable inference, the law of succession, and statistical inference,
    JASA 22, 1927): the shares p with |right / n - p| <= z sqrt(p (1 - p) / n).
    """
    share, n = right / questions, questions
    middle = share + Z95**2 / (2 * n)
    half = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    scale = 1 + Z95**2 / n
    low = 0.0 if right == 0 else (middle - half) / scale
    high = 1.0 if right == questions else (middle + half) / scale
    return low, high


def mcnemar(lost: int, gained: int) -> float:
    """How likely changes this uneven are if both models are equally good: McNemar's test, exact and two-sided.

    Q. McNemar, Note on the sampling error of the difference between correlated proportions or percentages,
    Psychometrika 12, 1947. Of the questions that only one of two models answers right, each then belongs to
    either with probability 1/2.
    """
    changed = lost + gained
    tail, ways = 0, 1
    for k in range(min(lost, gained) + 1):
        tail += ways  # binomial(changed, k)
        ways = ways * (changed - k) // (k + 1)
    return float(min(1.0, 2 * tail / 2**changed))


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A model's answers to the questions of one domain, beside the full model's.

    `lost` names the questions that the full model answers right and this one wrong, `gained` the opposite.
    """

    questions: int
    right: int
    lost: tuple[str, ...] = ()
    gained: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """The share of questions answered right."""
        return self.right / self.questions

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% confidence interval of `share` (`wilson`)."""
        return wilson(self.right, self.questions)

    @property
    def difference(self) -> float:
        """This model's share minus the full model's."""
        return (len(self.gained) - len(self.lost)) / self.questions

    @property
    def p_value(self) -> float:
        """Of `difference` (`mcnemar`)."""
        return mcnemar(len(self.lost), len(self.gained))

    def as_dict(self) -> dict[str, object]:
        """As in an evaluation's file."""
        return {
            "questions": self.questions,
            "right": self.right,
            "accuracy": self.share,
            "interval": list(self.interval),
            "difference": self.difference,
            "p_value": self.p_value,
            "lost": list(self.lost),
            "gained": list(self.gained),
        }

    @classmethod
    def read(cls, value: Mapping[str, object]) -> Accuracy:
        """Of an evaluation's file. Raises ValueError, KeyError or TypeError for anything else."""
        questions, right = value["questions"], value["right"]
        if (
            type(questions) is not int
            or type(right) is not int
            or not 0 <= right <= questions
            or not questions
        ):
            raise ValueError("right must be an integer of 0 to questions")
        lost, gained = (_names(value[key], key) for key in ("lost", "gained"))
        if len(gained) > right or len(lost) > questions - right:
            raise ValueError("lost or gained lists more questions than were answered so")
        return cls(questions, right, lost, gained)

    @classmethod
    def pooled(cls, parts: Sequence[Accuracy]) -> Accuracy:
        """All domains together."""
        return cls(
            sum(p.questions for p in parts),
            sum(p.right for p in parts),
            tuple(name for p in parts for name in p.lost),
            tuple(name for p in parts for name in p.gained),
        )


def _names(value: object, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{key} must be a list of strings")
    return tuple(value)


def compare(names: Sequence[str], right: Sequence[bool], full: Sequence[bool]) -> Accuracy:
    """Which questions a model and the full model answer right, paired by position."""
    rows = list(zip(names, right, full, strict=True))
    return Accuracy(
        len(rows),
        sum(right),
        tuple(name for name, ours, theirs in rows if theirs and not ours),
        tuple(name for name, ours, theirs in rows if ours and not theirs),
    )
