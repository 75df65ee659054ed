"""The acceptance rule gives the target's distribution, whatever the draft's: integrated, not sampled.

For given distributions the outcome of `rejection_sample` is a step function of its random numbers, with steps
at p(x) / q(x) and at the sums of what is drawn from. It is called once within each step, and the widths
of the steps are the outcome's probability.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from moe_surgery.runtime.speculation.acceptance import accept_greedy, rejection_sample, residual  # noqa: E402

Floats = np.ndarray


@st.composite
def distributions(draw: st.DrawFn, size: int) -> Floats:
    weights = draw(st.lists(st.integers(0, 12), min_size=size, max_size=size).filter(any))
    return np.array(weights, np.float64) / sum(weights)


@st.composite
def models(draw: st.DrawFn) -> tuple[int, list[Floats], list[Floats]]:
    """A vocabulary and two models of up to two tokens: rows[i][context] is the next token's distribution."""
    size, drafted = draw(st.integers(1, 3)), draw(st.integers(0, 2))

    def rows(length: int) -> list[Floats]:
        return [
            np.array([draw(distributions(size)) for _ in range(size**i)]).reshape(*[size] * (i + 1))
            for i in range(length)
        ]

    return size, rows(drafted), rows(drafted + 1)


def middles(edges: list[float]) -> list[tuple[float, float]]:
    """Of each step between `edges` within [0, 1): a point inside and its width."""
    cuts = sorted({0.0, 1.0, *(e for e in edges if 0 < e < 1)})
    return [((a + b) / 2, b - a) for a, b in itertools.pairwise(cuts)]


def sums(weights: Floats) -> list[float]:
    return list(weights.cumsum() / weights.sum()) if weights.sum() else []


@given(model=models(), valid=st.integers(0, 2))
def test_what_comes_out_is_distributed_as_the_target_draws(
    model: tuple[int, list[Floats], list[Floats]], valid: int
) -> None:
    size, q, p = model
    n = len(q)
    counts = min(valid, n)
    got = np.zeros([size] * (n + 1))
    for drafted in itertools.product(range(size), repeat=n):
        drawn_with = [q[i][drafted[:i]] for i in range(n)]
        asked = [p[i][drafted[:i]] for i in range(n + 1)]
        chance = float(np.prod([row[x] for row, x in zip(drawn_with, drafted, strict=True)]))
        if chance == 0:
            continue
        steps = [middles([a[x] / d[x]]) for a, d, x in zip(asked, drawn_with, drafted, strict=False)]
        last = [sums(np.maximum(a - d, 0)) for a, d in zip(asked, drawn_with, strict=False)]
        steps.append(middles([e for row in [*last, *map(sums, asked)] for e in row]))
        cells = list(itertools.product(*steps))
        uniform = torch.tensor([[u for u, _ in cell] for cell in cells], dtype=torch.float64)
        rows = len(cells)
        kept, after = rejection_sample(
            torch.tensor(drafted, dtype=torch.int64).expand(rows, n),
            torch.full((rows,), counts),
            torch.tensor(np.array(drawn_with).reshape(n, size)).expand(rows, n, size),
            torch.tensor(np.array(asked)).expand(rows, n + 1, size),
            uniform,
        )
        for cell, k, x in zip(cells, kept.tolist(), after.tolist(), strict=True):
            out = (*drafted[:k], x)
            assert k <= counts
            # Tokens after these come from later rounds, which draw as the target does.
            rest: Floats = np.array(1.0)
            for i in range(len(out), n + 1):
                rest = rest[..., None] * p[i][out]
            got[out] += chance * np.prod([width for _, width in cell]) * rest
    expected: Floats = np.array(1.0)
    for row in p:
        expected = expected[..., None] * row
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9)


@given(st.integers(1, 6).flatmap(lambda size: st.tuples(distributions(size), distributions(size))))
def test_the_residual_holds_what_the_draft_gives_too_little_of(pair: tuple[Floats, Floats]) -> None:
    p, q = pair
    got = residual(torch.tensor(p), torch.tensor(q)).numpy()
    if np.array_equal(p, q):
        np.testing.assert_array_equal(got, p)
    else:
        np.testing.assert_allclose(got, np.where(p > q, p - q, 0), atol=1e-12)


@given(distributions(5), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_a_draft_with_the_targets_distribution_is_always_accepted(p: Floats, n: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    row = torch.tensor(p, dtype=torch.float32)
    drafted = torch.multinomial(row, n, replacement=True, generator=random)[None]
    q, target = row.expand(1, n, 5), row.expand(1, n + 1, 5)
    uniform = torch.full((1, n + 1), 1 - 2**-24)  # the largest there is
    kept, after = rejection_sample(drafted, torch.tensor([n]), q, target, uniform)
    assert kept.tolist() == [n]
    assert p[int(after)] > 0


@given(
    st.integers(1, 4).flatmap(
        lambda n: st.lists(
            st.tuples(
                st.lists(st.integers(0, 2), min_size=n, max_size=n),
                st.integers(0, n),
                st.lists(st.integers(0, 2), min_size=n + 1, max_size=n + 1),
            ),
            min_size=1,
            max_size=4,
        )
    )
)
def test_greedy_keeps_drafted_tokens_up_to_the_first_that_the_target_would_not_take(
    rows: list[tuple[list[int], int, list[int]]],
) -> None:
    drafted = torch.tensor([row[0] for row in rows])
    best = torch.tensor([row[2] for row in rows])
    logits = torch.nn.functional.one_hot(best, 3).float()
    kept, after = accept_greedy(drafted, torch.tensor([row[1] for row in rows]), logits)
    for (tokens, count, expected), k, x in zip(rows, kept.tolist(), after.tolist(), strict=True):
        refused = [i for i in range(count) if tokens[i] != expected[i]]
        first = min(refused, default=count)
        assert (k, x) == (first, expected[first])
