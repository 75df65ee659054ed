"""The routing kernel in Triton's interpreter, against plain Python and the reference backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_surgery.errors import UsageError
from moe_surgery.kernels.reference import ReferenceBackend
from moe_surgery.kernels.triton.route import route
from moe_surgery.kernels.triton.tuning import DeviceProps
from tests.kernels.triton import oracle
from tests.kernels.triton.cases import EXPERTS, FEW_EXPERTS, TOKENS, TOP_K

HIDDEN = 96
ONE_PROGRAM, MANY = DeviceProps(90, 1), DeviceProps(90, 132)


def routed(x, weight, bias, top_k, device_props=ONE_PROGRAM):
    """(ids, weights) from the kernel, its outputs poisoned beforehand."""
    shape = (len(x), top_k)
    ids = torch.full(shape, -999, dtype=torch.int64)
    weights = torch.full(shape, float("nan"), dtype=x.dtype)
    route(x, weight, bias, top_k, ids, weights, device_props, True).run()
    return ids, weights


def inputs(tokens, experts, hidden=HIDDEN, seed=0):
    """Small integers: every logit is exact, whatever the order of summation, and ties are many."""
    random = torch.Generator().manual_seed(seed)
    draw = [
        torch.randint(-2, 3, shape, generator=random).float()
        for shape in ((tokens, hidden), (experts, hidden))
    ]
    return draw[0], draw[1] / 8, torch.randint(-1, 2, (experts,), generator=random).float()


@pytest.mark.parametrize(
    "experts", [n if n in FEW_EXPERTS else pytest.param(n, marks=pytest.mark.slow) for n in EXPERTS]
)
def test_every_count_of_experts(experts: int) -> None:
    """All tokens, and a top-k for each such that every top-k comes up; ids exact although logits tie."""
    allowed = [k for k in TOP_K if k <= experts]
    for n, tokens in enumerate(TOKENS):
        top_k = allowed[(n + experts) % len(allowed)]
        x, weight, bias = inputs(tokens, experts, seed=n)
        ids, weights = routed(x, weight, bias, top_k, MANY if n % 2 else ONE_PROGRAM)
        expected, shares = oracle.route(
            x.double().numpy(), weight.double().numpy(), bias.double().numpy(), top_k
        )
        assert (ids.numpy() == expected).all()
        np.testing.assert_allclose(weights.numpy(), shares, rtol=2e-6, atol=1e-30)
        reference = ReferenceBackend().route(x, weight, bias, top_k)
        assert torch.equal(ids, reference[0])


@pytest.mark.slow
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_full_grid(experts: int, tokens: int) -> None:
    for top_k in (k for k in TOP_K if k <= experts):
        x, weight, bias = inputs(tokens, experts, seed=top_k)
        for device_props in (ONE_PROGRAM, MANY):
            ids, weights = routed(x, weight, bias, top_k, device_props)
            expected = ReferenceBackend().route(x, weight, bias, top_k)
            assert torch.equal(ids, expected[0])
            torch.testing.assert_close(weights, expected[1], rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize(
    ("experts", "top_k", "tokens"),
    [
        (1024, 1, 5),
        (33, 33, 2),
        (17, 16, 5),
        (17, 17, 1),
        (255, 17, 1),
        pytest.param(1024, 17, 1, marks=pytest.mark.slow),
        pytest.param(255, 200, 2, marks=pytest.mark.slow),
    ],
)
def test_many_experts_and_large_top_k(experts: int, top_k: int, tokens: int) -> None:
    """Up to the most experts; top-k past 16 takes the sort instead of repeated maxima."""
    x, weight, bias = inputs(tokens, experts, hidden=32)
    ids, weights = routed(x, weight, bias, top_k)
    expected = ReferenceBackend().route(x, weight, bias, top_k)
    assert torch.equal(ids, expected[0])
    torch.testing.assert_close(weights, expected[1], rtol=3e-6, atol=1e-30)


@pytest.mark.parametrize(("top_k", "tokens"), [(3, 1), (3, 7), (20, 1)])
def test_nan_and_infinity_as_the_reference(top_k: int, tokens: int) -> None:
    """NaN of either sign before infinity, -inf last, -0 equal to 0, all ties by index."""
    nan, inf = float("nan"), float("inf")
    special = [0.0, -0.0, nan, inf, -inf, -nan, inf, 1e-45, -1e-45, 1.0, 1.0, -1.0, 0.0, nan, -inf, 3e38]
    rows = [special + [2.0] * 8, [0.0] * 24, [-inf] * 24, [inf] * 24, [nan] * 24, [1.0, 1.0 + 2**-23] * 12]
    for row in rows:
        bias = torch.tensor(row)
        x, weight = torch.zeros(tokens, 32), torch.zeros(24, 32)
        ids, weights = routed(x, weight, bias, top_k)
        expected = ReferenceBackend().route(x, weight, bias, top_k)
        assert torch.equal(ids, expected[0]), row
        torch.testing.assert_close(weights, expected[1], rtol=2e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_narrow_inputs(dtype: torch.dtype, tokens: int) -> None:
    """Inputs are exact in both types, so ids must be; weights are rounded to the type once."""
    x, weight, bias = (t.to(dtype) for t in inputs(tokens, 13))
    ids, weights = routed(x, weight, bias, 4, MANY)
    expected = ReferenceBackend().route(x, weight, bias, 4)
    assert torch.equal(ids, expected[0])
    torch.testing.assert_close(weights, expected[1], rtol=1e-2, atol=1e-6)


def test_counters_are_left_at_zero_so_a_second_call_works() -> None:
    x, weight, bias = inputs(1, 96)
    first = routed(x, weight, bias, 4, MANY)
    second = routed(x, weight, bias, 4, MANY)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("experts", "top_k", "says"), [(4, 5, "top-k 5 of 4"), (4, 0, "top-k 0"), (1025, 1, "1025 experts")]
)
def test_refusals(experts: int, top_k: int, says: str) -> None:
    x, weight, bias = inputs(1, experts, hidden=32)
    with pytest.raises(UsageError, match=says):
        routed(x, weight, bias, top_k)
