"""Tokens are drawn from the distribution that the settings describe."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from moe_surgery.errors import UsageError  # noqa: E402
from moe_surgery.runtime.sampling import Sampler, Sampling, distribution  # noqa: E402
from tests.support.chi_square import critical  # noqa: E402

EDGE = 1e-4  # a filter's edge nearer than this to a probability is a matter of rounding


def brute_force(logits: list[float], sampling: Sampling) -> np.ndarray:
    """The description in float64, a token at a time."""
    scaled = np.array(logits, np.float64) / sampling.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda token: (-logits[token], token))
    kept = order[: sampling.top_k or len(order)]
    p = only(p, kept)
    if sampling.top_p < 1:
        smallest: list[int] = []
        for token in kept:
            assume(abs(p[smallest].sum() - sampling.top_p) > EDGE)
            if p[smallest].sum() < sampling.top_p:
                smallest.append(token)
        p, kept = only(p, smallest), smallest
    for token in kept:
        assume(sampling.min_p == 0 or token == order[0] or abs(p[token] - sampling.min_p * p.max()) > EDGE)
    return only(p, [token for token in kept if p[token] >= sampling.min_p * p.max()])


def only(p: np.ndarray, kept: list[int]) -> np.ndarray:
    left = np.zeros_like(p)
    left[kept] = p[kept]
    return left / left.sum()


logit_rows = st.lists(st.integers(-12, 12).map(lambda n: n / 4), min_size=1, max_size=12)
samplings = st.builds(
    Sampling,
    temperature=st.floats(0.1, 5),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.01, 1) | st.just(1.0),
    min_p=st.floats(0, 1) | st.just(0.0),
)


@given(logits=logit_rows, sampling=samplings)
def test_the_distribution_is_the_described_one(logits: list[float], sampling: Sampling) -> None:
    expected = brute_force(logits, sampling)
    got = distribution(torch.tensor([logits]), sampling)[0].double().numpy()
    assert ((got > 0) == (expected > 0)).all()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@given(logits=logit_rows)
def test_greedy_takes_the_likeliest_surely(logits: list[float]) -> None:
    got = distribution(torch.tensor([logits]), Sampling())
    assert got.max() == got.sum() == 1
    assert logits[int(got.argmax())] == max(logits)
    tokens, _ = Sampler(Sampling())(torch.tensor([logits]))
    assert logits[int(tokens)] == max(logits)


def test_everything_is_kept_without_filters() -> None:
    logits = torch.linspace(0, -60, 4000)[None]
    plain = distribution(logits, Sampling(1.0))
    assert torch.equal(distribution(logits, Sampling(1.0, top_k=4000)) > 0, plain > 0)


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-10])
def test_the_coldest_temperatures_are_greedy(temperature: float) -> None:
    got = distribution(torch.tensor([[1.0, 3.0, 2.0, -math.inf]]), Sampling(temperature))
    assert got.tolist() == [[0, 1, 0, 0]]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0, seed=1),
        Sampling(0.7, seed=2),
        Sampling(1.3, top_k=5, seed=3),
        Sampling(1.0, top_p=0.8, seed=4),
        Sampling(1.0, min_p=0.2, seed=5),
        Sampling(0.9, 7, 0.95, 0.05, seed=6),
    ],
)
def test_drawn_tokens_follow_the_distribution(sampling: Sampling) -> None:
    rows, draws = 50, 400
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(sampling)
    tokens = torch.cat([sampler(logits.expand(rows, -1))[0] for _ in range(draws)])
    counts = torch.bincount(tokens, minlength=12).double()
    expected = distribution(logits, sampling)[0].double() * rows * draws
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < critical(int(possible.sum()) - 1)


def test_rows_of_a_batch_draw_on_their_own() -> None:
    logits = torch.zeros(64, 1000)
    tokens, _ = Sampler(Sampling(1.0, seed=0))(logits)
    assert len(set(tokens.tolist())) > 50


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, seed=3), Sampling(2.0, 9, 0.9, 0.01, 3)])
def test_the_same_seed_draws_the_same_tokens(sampling: Sampling) -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    one, other = Sampler(sampling), Sampler(sampling)
    for _ in range(20):
        torch.rand(3)  # the global generator plays no part
        assert torch.equal(one(logits)[0], other(logits)[0])


def test_other_seeds_and_no_seed_draw_other_tokens() -> None:
    logits = torch.zeros(1, 1 << 20)
    drawn = {int(Sampler(Sampling(1.0, seed=seed))(logits)[0]) for seed in (0, 1, 2, None, None)}
    assert len(drawn) == 5


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.5, 3, 0.9, 0.1, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_the_unfiltered_models(sampling: Sampling, dtype: torch.dtype) -> None:
    logits = torch.randn(6, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens, got = Sampler(sampling)(logits)
    exact = logits.double() - logits.double().logsumexp(-1, keepdim=True)
    assert got.dtype == torch.float32
    expected = torch.stack([row[token] for row, token in zip(exact, tokens, strict=True)])
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)


REFUSED = {
    "temperature": [-0.1, math.nan, math.inf],
    "top_k": [-1],
    "top_p": [0.0, -0.5, 1.5, math.nan],
    "min_p": [-0.1, 1.1, math.nan],
    "seed": [-1, 1 << 63],
}


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, values in REFUSED.items() for v in values])
def test_a_setting_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(UsageError) as caught:
        replace(Sampling(), **{name: value})
    assert str(caught.value).startswith(f"`sampling.{name}` {value}: must ")


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (1 - 2**-24, 3)])
def test_the_ends_of_the_unit_interval_fall_on_possible_tokens(
    uniform: float, token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, uniform))
    logits = torch.tensor([[-math.inf, 1.0, 1.0, 1.0, -math.inf]])
    assert Sampler(Sampling(1.0))(logits)[0].tolist() == [token]
