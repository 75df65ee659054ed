"""The step without gradients against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moe_surgery.families.gpt_oss.weights import WEIGHTS  # noqa: E402
from moe_surgery.quality.repair.mean_error import bias_shifts, shift_biases  # noqa: E402
from moe_surgery.quality.repair.samples import Sample  # noqa: E402
from moe_surgery.quality.repair.student import Student  # noqa: E402
from moe_surgery.runtime.model import CausalLM  # noqa: E402
from moe_surgery.selection.plan import Plan  # noqa: E402

PLAN = Plan("gpt_oss", 32, tuple(tuple(range(i, 32, 4)) for i in range(4)))
TEXTS = [Sample("a", tuple(range(5, 45)), 0, 39), Sample("a", tuple(range(300, 330)), 0, 29)]


def routed(tokens: int, experts: int) -> np.ndarray:
    """Weights of two experts a token; they sum to one."""
    rng = np.random.default_rng(0)
    gates = np.zeros((tokens, experts))
    for row in gates:
        chosen = rng.permutation(experts)[:2]
        row[chosen] = rng.dirichlet([1, 1])
    return gates


@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_the_shifts_are_the_least_squares_ones(ridge: float) -> None:
    """As ordinary least squares with a row more for each expert solves them."""
    gates, error = routed(50, 6), np.random.default_rng(1).normal(size=(50, 8)) + 3
    mean = error.mean(axis=0)
    damped = np.concatenate([gates, np.sqrt(ridge * 50 / 6) * np.eye(6)])
    wanted = np.concatenate([error - mean, np.zeros((6, 8))])
    expected = mean + np.linalg.lstsq(damped, wanted, rcond=None)[0]
    actual = bias_shifts(torch.from_numpy(gates), torch.from_numpy(error), ridge)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_an_error_that_all_tokens_share_is_removed() -> None:
    error = np.tile(np.arange(8.0), (50, 1))
    shifts = bias_shifts(torch.from_numpy(routed(50, 6)), torch.from_numpy(error))
    np.testing.assert_allclose(shifts.numpy(), error[:6], atol=1e-9)


def test_hidden_states_come_closer_to_the_full_models_in_every_layer(tiny_model: CausalLM) -> None:
    def errors(student: Student) -> list[float]:
        """Mean squared error of the hidden states after each layer."""
        everything = Plan("gpt_oss", 32, (tuple(range(32)),) * 4)
        full = Student(tiny_model, everything, WEIGHTS, norms=False)
        a, b = full.embed(TEXTS), student.embed(TEXTS)
        result = []
        for number in range(4):
            a, b = full.apply(number, a, [40, 30]), student.apply(number, b, [40, 30])
            result.append(float((a - b).square().mean()))
        return result

    student = Student(tiny_model, PLAN, WEIGHTS, norms=False)
    before = errors(student)
    originals = student.tensors.clones()
    shift_biases(tiny_model, student, TEXTS)
    changed = {n for n, v in student.tensors.values.items() if not torch.equal(v, originals[n])}
    assert changed == {f"model.layers.{i}.mlp.experts.down_proj_bias" for i in range(4)}
    after = errors(student)
    assert all(b < a for a, b in zip(before, after, strict=True))
