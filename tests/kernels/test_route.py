"""The router takes the k largest logits, lowest expert first among equals, and weighs them alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from moe_surgery.kernels.reference import ReferenceBackend  # noqa: E402
from tests.kernels.brute_force import brute_force_route  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
route = ReferenceBackend().route


@st.composite
def routers(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Small whole numbers, so that logits are exact in every dtype and ties are many."""
    tokens, experts, hidden = draw(st.integers(1, 4)), draw(st.integers(1, 40)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    most = draw(st.integers(0, 3))
    x, weight, bias = (
        rng.integers(-most, most + 1, s) for s in ((tokens, hidden), (experts, hidden), experts)
    )
    return x, weight, bias, draw(st.integers(1, experts))


@pytest.mark.parametrize("dtype", DTYPES)
@given(case=routers())
def test_route_is_the_stable_top_k_and_its_softmax(
    dtype: torch.dtype, case: tuple[np.ndarray, np.ndarray, np.ndarray, int]
) -> None:
    x, weight, bias, top_k = case
    ids, weights = route(*(torch.from_numpy(a).to(dtype) for a in (x, weight, bias)), top_k)
    expected_ids, expected_weights = brute_force_route(x @ weight.T + bias.astype(np.float64), top_k)
    assert ids.dtype == torch.int64
    assert weights.dtype == dtype
    assert np.array_equal(ids.numpy(), expected_ids)
    np.testing.assert_allclose(
        weights.double().numpy(), expected_weights, rtol=0, atol=4 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("top_k", range(1, 33))
def test_equal_logits_route_to_the_first_experts_equally(top_k: int) -> None:
    x, weight, bias = torch.ones(2, 3), torch.zeros(32, 3), torch.full((32,), 0.5)
    ids, weights = route(x, weight, bias, top_k)
    assert ids.tolist() == [list(range(top_k))] * 2
    torch.testing.assert_close(weights, torch.full((2, top_k), 1 / top_k))


def test_logits_far_apart_give_weights_that_are_numbers() -> None:
    x, weight = torch.tensor([[1e4, -1e4]]), torch.tensor([[1e4, 0.0], [0.0, 1e4], [0.0, 0.0]])
    ids, weights = route(x, weight, torch.zeros(3), 3)
    assert ids.tolist() == [[0, 2, 1]]
    assert weights.tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_that_only_float32_tells_apart_are_told_apart(dtype: torch.dtype) -> None:
    x, weight = torch.tensor([[1.0, 2**-12]]), torch.tensor([[4.0, 0.0], [4.0, 1.0]])
    ids, _ = route(x.to(dtype), weight.to(dtype), torch.zeros(2, dtype=dtype), 1)
    assert ids.tolist() == [[1]]
