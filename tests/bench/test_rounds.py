"""Jobs take turns; medians, ranges and percentiles are what their names say."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_surgery.bench.rounds import check_numbers, interleaved, median_range, percentile, rounded
from moe_surgery.errors import UsageError

figures = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)


@given(st.integers(1, 5), st.integers(1, 6))
def test_every_job_runs_once_a_round_and_none_is_always_first(jobs: int, rounds: int) -> None:
    ran: list[int] = []
    calls = [partial(ran.append, job) for job in range(jobs)]
    seen = [(number, job) for number, job, _ in interleaved(calls, rounds)]
    assert [job for _, job in seen] == ran
    by_round = [ran[i : i + jobs] for i in range(0, len(ran), jobs)]
    assert all(sorted(order) == list(range(jobs)) for order in by_round)
    assert [order[0] for order in by_round] == [number % jobs for number in range(rounds)]
    assert [number for number, _ in seen] == [i for i in range(rounds) for _ in range(jobs)]


@given(figures)
def test_a_spread_is_median_and_range(values: list[float]) -> None:
    result = median_range(values)
    assert result.median == pytest.approx(float(np.median(values)))
    assert (result.low, result.high) == (min(values), max(values))


@given(figures, st.floats(0, 1))
def test_a_percentile_is_the_nearest_rank(values: list[float], share: float) -> None:
    expected = np.quantile(values, share, method="inverted_cdf")
    assert percentile(values, share) == expected


@given(st.floats(1e-3, 1e9))
def test_three_digits_are_kept_and_large_figures_have_no_exponent(value: float) -> None:
    result = rounded(value)
    assert "e" not in result
    assert float(result) == pytest.approx(value, rel=5e-3)


def test_numbers_below_one_name_their_option() -> None:
    check_numbers(batch=[1, 8], new_tokens=[1])
    with pytest.raises(UsageError, match="`new_tokens` 0: must be at least 1"):
        check_numbers(batch=[1], new_tokens=[3, 0])
