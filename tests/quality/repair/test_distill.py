"""The optimizer against torch's, and when a repair counts as one."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from moe_surgery.quality.repair.distill import BETAS, EPSILON, _Adam, helps, schedule  # noqa: E402
from moe_surgery.quality.repair.state import RepairState  # noqa: E402


def test_steps_are_those_of_torchs_adam() -> None:
    generator = torch.Generator().manual_seed(0)
    start = {"a": torch.randn(3, 4, generator=generator), "b": torch.randn(5, generator=generator)}
    sizes = {"a": 0.03, "b": 0.5}
    ours = {name: value.clone().requires_grad_() for name, value in start.items()}
    theirs = {name: value.clone().requires_grad_() for name, value in start.items()}
    torchs = torch.optim.Adam(
        [{"params": [value], "lr": sizes[name]} for name, value in theirs.items()], betas=BETAS, eps=EPSILON
    )
    state = RepairState()
    adam = _Adam(ours, state)
    for number in range(1, 8):
        for name, value in ours.items():
            value.grad = torch.randn(value.shape, generator=generator)
            theirs[name].grad = value.grad.clone()
        if number == 5:  # as after an interruption
            adam.keep(state)
            adam = _Adam(ours, state)
        adam.step(sizes, 1.0, number)
        torchs.step()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)


def test_the_learning_rate_rises_and_falls_to_zero() -> None:
    factors = [schedule(step, 100) for step in range(101)]
    highest = factors.index(max(factors))
    assert 0 < factors[0] < factors[1] < max(factors) <= 1
    assert factors[highest:] == sorted(factors[highest:], reverse=True)
    assert factors[100] == pytest.approx(0, abs=1e-9)
    assert math.isclose(schedule(50, 100), 0.5)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([10.0, 12.0, 11.0], [8.0, 9.0, 8.5], True),
        ([10.0, 12.0, 11.0], [9.99, 11.99, 10.99], False),  # less than a hundredth
        ([10.0, 12.0, 11.0], [2.0, 19.0, 10.0], False),  # one text got better, another worse
        ([10.0, 10.0, 10.0], [8.0, 10.1, 10.0], False),  # nothing but for one text
        ([0.9, 0.9, 0.9], [0.5, 0.5, 0.5], False),  # less than 0.005 nats a token
        ([10.0], [8.0], True),
        ([10.0], [11.0], False),
    ],
)
def test_a_repair_counts_where_the_gain_is_more_than_chance(
    before: list[float], after: list[float], expected: bool
) -> None:
    assert helps(torch.tensor(before), torch.tensor(after), 300) is expected
