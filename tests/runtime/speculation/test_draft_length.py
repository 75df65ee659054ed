"""Lengths, speed-ups and the break-even acceptance follow from acceptance and costs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

from moe_surgery.errors import UsageError
from moe_surgery.runtime.speculation.draft_length import (
    AdaptiveLength,
    Costs,
    LengthControl,
    best_length,
    break_even,
    expected_tokens,
    speed_up,
)

rates = st.floats(0, 1)
costs = st.builds(
    lambda draft, first, more: Costs(draft, list(itertools.accumulate([first, *more]))),
    st.floats(0.01, 2),
    st.floats(0.1, 3),
    st.lists(st.floats(0, 1), min_size=8, max_size=8),
)


@given(rates, st.integers(0, 6))
def test_expected_tokens_are_the_mean_over_all_outcomes(rate: float, length: int) -> None:
    mean = 0.0
    for outcome in itertools.product([True, False], repeat=length):
        chance = 1.0
        for accepted in outcome:
            chance *= rate if accepted else 1 - rate
        mean += chance * (len(list(itertools.takewhile(bool, outcome))) + 1)
    assert expected_tokens(rate, length) == pytest.approx(mean)


def test_a_speed_up_by_hand() -> None:
    known = Costs(0.2, [1.0, 1.1, 1.3])
    # Half accepted: 1 + 1/2 + 1/4 tokens for two draft steps and a target step over three tokens.
    assert speed_up(0.5, 2, known) == pytest.approx(1.75 / 1.7)


@given(rates, costs, st.integers(1, 8))
def test_the_best_length_is_the_fastest(rate: float, known: Costs, most: int) -> None:
    result = best_length(rate, known, most)
    fastest = max(speed_up(rate, n, known) for n in range(1, most + 1))
    assert speed_up(rate, result, known) == fastest
    assert all(speed_up(rate, n, known) < fastest for n in range(1, result))


@given(costs, st.integers(1, 8))
def test_break_even_divides_loss_from_gain(known: Costs, length: int) -> None:
    edge = break_even(length, known)
    if edge is None:
        assert speed_up(1.0, length, known) < 1
        return
    assert speed_up(min(1.0, edge + 1e-6), length, known) >= 1
    if edge > 1e-6:
        assert speed_up(edge - 1e-6, length, known) < 1


def test_a_fixed_length_stays() -> None:
    control = LengthControl(3)
    control.observe([3, 3], [0, 0])
    assert (control.next(), control.max_length, control.confidence) == (3, 3, 0.0)


def test_an_adaptive_length_follows_what_is_accepted() -> None:
    cheap = Costs(0.05, [1.0 + 0.02 * n for n in range(9)])
    control = LengthControl(AdaptiveLength(costs=cheap, memory=0.5))
    seen = []
    for accepted in [8] * 12 + [0] * 12:
        n = control.next()
        control.observe([n], [min(n, accepted)])
        seen.append(control.next())
    assert seen[11] == 8
    assert seen[-1] == 1
    assert control.acceptance == pytest.approx(0, abs=1e-2)


def test_tokens_after_a_refused_one_count_for_nothing() -> None:
    one, other = (LengthControl(AdaptiveLength(memory=0.0)) for _ in range(2))
    one.observe([8, 2, 0], [2, 2, 0])
    other.observe([3, 2], [2, 2])
    assert one.acceptance == other.acceptance == 4 / 5


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"max_length": 0}, "`draft_length` 0: must be 1 to 64"),
    "too many": ({"max_length": 65}, "`draft_length` 65: must be 1 to 64"),
    "confidence": ({"confidence": 1.5}, "confidence 1.5: must be between 0 and 1"),
    "memory": ({"memory": -1}, "memory -1: must be between 0 and 1"),
    "few costs": ({"max_length": 2, "costs": Costs(1, [1, 2])}, "costs of 2 target steps; needed for 0 to 2"),
}


@pytest.mark.parametrize(("settings", "said"), REFUSED.values(), ids=REFUSED)
def test_a_rule_that_cannot_be_meant_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        AdaptiveLength(**settings)
    if not settings.keys() - {"max_length"}:
        with pytest.raises(UsageError, match=said):
            LengthControl(settings["max_length"])
