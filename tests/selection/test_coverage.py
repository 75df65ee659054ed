"""Coverage by the first experts, against plain counting."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_surgery.errors import InvalidInputError, UsageError
from moe_surgery.selection.coverage import coverage, smallest_count
from moe_surgery.selection.statistics import ExpertStatistics

# Weights in 1024ths, so that sums are exact in any order.
WEIGHTS = st.integers(0, 4096)


def layer(weights: list[int]) -> ExpertStatistics:
    result = ExpertStatistics.zeros(len(weights), 1)
    result.gate += np.array(weights) / 1024
    result.count += np.array(weights) > 0
    return result


@st.composite
def layers(draw: st.DrawFn) -> list[list[int]]:
    experts = draw(st.integers(1, 12))
    row = st.lists(WEIGHTS, min_size=experts, max_size=experts).filter(any)
    return draw(st.lists(row, min_size=1, max_size=4))


def carried(weights: list[int], ranked: list[int], count: int) -> Fraction:
    return Fraction(sum(weights[e] for e in ranked[:count]), sum(weights))


def by_weight(weights: list[int]) -> list[int]:
    return sorted(range(len(weights)), key=lambda e: (-weights[e], e))


@given(layers(), st.randoms())
def test_shares_are_sums_of_the_first_experts_weights(weights: list[list[int]], random) -> None:  # type: ignore[no-untyped-def]
    orders = [random.sample(range(len(row)), len(row)) for row in weights]
    for given_, used in ((None, [by_weight(row) for row in weights]), (orders, orders)):
        shares = coverage([layer(row) for row in weights], given_)
        for row, ranked, share in zip(weights, used, shares, strict=True):
            expected = [float(carried(row, ranked, n)) for n in range(1, len(row) + 1)]
            np.testing.assert_allclose(share, expected, rtol=1e-15)


@given(layers(), st.integers(1, 8))
def test_the_smallest_count_is_the_first_that_carries_enough(weights: list[list[int]], eighths: int) -> None:
    expected = Fraction(eighths, 8)
    shares = coverage([layer(row) for row in weights])
    counts = range(1, len(weights[0]) + 1)
    orders = [by_weight(row) for row in weights]

    def worst(count: int) -> Fraction:
        return min(carried(row, ranked, count) for row, ranked in zip(weights, orders, strict=True))

    assert smallest_count(shares, float(expected)) == next(n for n in counts if worst(n) >= expected)


@given(layers())
def test_the_mean_asks_for_no_more_than_the_worst_layer(weights: list[list[int]]) -> None:
    shares = coverage([layer(row) for row in weights])
    for expected in (0.001, 0.3, 0.5, 0.9, 0.999):
        mean = smallest_count(shares, expected, "mean")
        assert mean <= smallest_count(shares, expected)
        assert shares[:, mean - 1].mean() >= expected
        assert mean == 1 or shares[:, mean - 2].mean() < expected


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=200), st.integers(0, 50))
def test_everything_is_carried_by_the_experts_that_were_chosen(gates: list[float], unused: int) -> None:
    """With any rounding of the sums, an expert that was never chosen is not needed for full coverage."""
    result = ExpertStatistics.zeros(len(gates) + unused, 1)
    result.gate[: len(gates)] = gates
    assert smallest_count(coverage([result]), 1.0) <= len(gates)
    assert smallest_count(coverage([result, result]), 1.0, "mean") <= len(gates)


def test_a_ranking_by_something_else_needs_more_experts() -> None:
    weights = layer([8, 4, 2, 1, 1])
    assert smallest_count(coverage([weights]), 0.75) == 2
    assert smallest_count(coverage([weights], [[4, 3, 2, 1, 0]]), 0.75) == 5


def test_a_layer_without_routes_is_named() -> None:
    with pytest.raises(InvalidInputError, match="no routed tokens in layer 1"):
        coverage([layer([1, 2]), ExpertStatistics.zeros(2, 1)])


@pytest.mark.parametrize("wanted", [0.0, -0.5, 1.0001, 95.0, float("nan"), float("inf")])
def test_a_share_out_of_range_is_refused(wanted: float) -> None:
    with pytest.raises(UsageError, match="must be above 0 and at most 1"):
        smallest_count(coverage([layer([1, 2])]), wanted)


def test_an_unknown_way_to_hold_it_is_refused() -> None:
    with pytest.raises(UsageError, match="`coverage_over` best: choose one of worst, mean"):
        smallest_count(coverage([layer([1, 2])]), 0.5, "best")
