"""Intervals and tests against their definitions."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_surgery.quality.accuracy import Accuracy, compare, mcnemar, wilson


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(max_examples=100)
def test_the_interval_holds_the_shares_that_a_score_test_does_not_reject(counts: tuple[int, int]) -> None:
    right, n = counts
    low, high = wilson(right, n)

    def rejected(p: float) -> bool:
        return abs(right / n - p) > 1.959963984540054 * math.sqrt(p * (1 - p) / n)

    assert 0 <= low <= right / n <= high <= 1
    step = 1e-9
    for inside, outside in ((low + step, low - step), (high - step, high + step)):
        assert not rejected(inside)
        assert not 0 <= outside <= 1 or rejected(outside)


def test_the_interval_of_a_published_example() -> None:
    """R. G. Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I, method 3."""
    for right, n, expected in (
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0, 0.1611)),
    ):
        assert wilson(right, n) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (2, 2), (7, 1), (3, 8), (0, 11)])
def test_the_test_counts_outcomes_at_least_as_uneven(lost: int, gained: int) -> None:
    changed = lost + gained
    uneven = abs(lost - gained)
    outcomes = [abs(2 * sum(flips) - changed) >= uneven for flips in product((0, 1), repeat=changed)]
    assert mcnemar(lost, gained) == pytest.approx(sum(outcomes) / len(outcomes))


def test_the_test_of_many_changes_is_a_number() -> None:
    assert 0 <= mcnemar(3000, 2000) < 1e-30
    assert mcnemar(2500, 2500) == 1


def test_models_are_paired_question_by_question() -> None:
    found = compare("abcdef", [True, False, True, False, True, True], [True, True, False, False, True, False])
    assert found == Accuracy(6, 4, lost=("b",), gained=("c", "f"))
    assert (found.share, found.difference) == (4 / 6, 1 / 6)
    assert Accuracy.read(found.as_dict()) == found
    assert Accuracy.pooled([found, Accuracy(2, 1, ("x",))]) == Accuracy(8, 5, ("b", "x"), ("c", "f"))


@pytest.mark.parametrize(
    "change",
    [
        {"questions": 0},
        {"right": 7},
        {"right": True},
        {"lost": "b"},
        {"lost": [1]},
        {"gained": list("abcdefg")},
    ],
)
def test_figures_that_cannot_be_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must be|lists"):
        Accuracy.read({**Accuracy(6, 4, ("b",), ("c",)).as_dict(), **change})
