"""Non-negative least squares against all choices of free coefficients, and the conditions of an optimum."""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_surgery.selection.imatrix.nnls import nnls


def brute_force(a: np.ndarray, b: np.ndarray) -> float:
    """The smallest |a x - b| over all sets of free coefficients."""
    columns = range(a.shape[1])
    best = float(np.linalg.norm(b))
    for free in chain.from_iterable(combinations(columns, k) for k in range(1, a.shape[1] + 1)):
        x = np.linalg.lstsq(a[:, list(free)], b, rcond=None)[0]
        if (x >= 0).all():
            best = min(best, float(np.linalg.norm(a[:, list(free)] @ x - b)))
    return best


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(0, 6), st.booleans())
def test_it_is_the_best_of_all_choices(seed: int, columns: int, more: int, similar: bool) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(columns + more, columns)), rng.normal(size=columns + more)
    if similar:
        a += 20
    x = nnls(a, b)
    assert (x >= 0).all()
    assert np.linalg.norm(a @ x - b) <= brute_force(a, b) * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("columns", [1, 32, 200])
def test_large_problems_satisfy_the_conditions_of_an_optimum(columns: int) -> None:
    rng = np.random.default_rng(columns)
    a = np.exp(rng.normal(size=(3 * columns, columns)))
    truth = np.maximum(rng.normal(size=columns), 0)
    np.testing.assert_allclose(nnls(a, a @ truth), truth, atol=1e-9)
    b = a @ truth + rng.normal(size=3 * columns)
    x = nnls(a, b)
    gradient = a.T @ (a @ x - b)
    size = np.linalg.norm(a, axis=0) * np.linalg.norm(b)
    assert (x >= 0).all()
    assert (gradient >= -1e-9 * size).all()
    assert (np.abs(gradient[x > 0]) <= 1e-9 * size[x > 0]).all()


def test_columns_that_are_zero_or_equal_do_no_harm() -> None:
    a = np.array([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0], [0.5, 0.5, 0.0]])
    x = nnls(a, a @ np.array([3.0, 0.0, 0.0]))
    np.testing.assert_allclose(a @ x, a @ np.array([3.0, 0.0, 0.0]))
    assert (x >= 0).all()
