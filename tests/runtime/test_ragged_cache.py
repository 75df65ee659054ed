"""Sequences of a batch may roll back different numbers of tokens; each still gives what it gives alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from moe_surgery.errors import UsageError  # noqa: E402
from moe_surgery.kernels.interface import SHORT_STEP  # noqa: E402
from moe_surgery.runtime.cache import Cache  # noqa: E402
from moe_surgery.runtime.model import CausalLM  # noqa: E402
from tests.runtime.conftest import SMALL, WINDOW  # noqa: E402

TOLERANCE = 1e-4
ROWS = 3


@st.composite
def edits(draw: st.DrawFn) -> tuple[int, list[int], list[tuple[list[int], int]]]:
    """A rollback, padding of each row, and steps: lengths to keep of each row, and tokens to add."""
    rollback = draw(st.integers(0, 2 * WINDOW))
    prompt = draw(st.integers(1, 2 * WINDOW))
    pads = [draw(st.integers(0, prompt - 1)) for _ in range(ROWS)]
    lengths, longest = [prompt] * ROWS, [prompt] * ROWS
    steps = [([0] * ROWS, prompt)]
    for _ in range(draw(st.integers(1, 8))):
        kept = []
        for length, most in zip(lengths, longest, strict=True):
            least = max(1, most - rollback)
            # Now and then a row starts over.
            kept.append(0 if draw(st.integers(0, 9)) == 0 else draw(st.integers(least, length)))
        new = draw(st.integers(1, WINDOW + 4))
        lengths = [n + new for n in kept]
        longest = [max(f, n) if k else n for f, n, k in zip(longest, lengths, kept, strict=True)]
        steps.append((kept, new))
    return rollback, pads, steps


def in_short_steps(model: CausalLM, text: list[int]) -> torch.Tensor:
    """Logits [tokens, vocab_size]: a backend may round otherwise in long steps."""
    cache = model.new_cache(1, len(text))
    return torch.cat([model(part, cache) for part in torch.tensor([text]).split(SHORT_STEP, dim=1)], dim=1)[0]


@given(seed=st.integers(0, 99), plan=edits())
@settings(max_examples=15)
def test_rows_that_roll_back_different_numbers_give_what_each_gives_alone(
    steady_model: CausalLM, seed: int, plan: tuple[int, list[int], list[tuple[list[int], int]]]
) -> None:
    rollback, pads, steps = plan
    random = torch.Generator().manual_seed(seed)
    context = sum(new for _, new in steps)
    cache = steady_model.new_cache(ROWS, context, rollback=rollback)
    nbytes = cache.nbytes
    texts: list[list[int]] = [[] for _ in range(ROWS)]
    for number, (kept, new) in enumerate(steps):
        if number:
            cache.truncate(kept)
        more = torch.randint(0, SMALL.vocabulary, (ROWS, new), generator=random)
        mask = None
        if not number:
            mask = torch.tensor([[0] * pad + [1] * (new - pad) for pad in pads])
        got = steady_model(more, cache, mask)
        assert cache.lengths == tuple(k + new for k in kept)
        for row in range(ROWS):
            pads[row] = min(pads[row], kept[row]) if number else pads[row]
            texts[row] = texts[row][: kept[row]] + more[row].tolist()
            alone = in_short_steps(steady_model, texts[row][pads[row] :])
            first = max(kept[row], pads[row])
            torch.testing.assert_close(
                got[row, first - kept[row] :], alone[first - pads[row] :], rtol=0, atol=TOLERANCE
            )
    assert cache.nbytes == nbytes


def filled(model: CausalLM, *, rollback: int = 4, tokens: int = 30) -> Cache:
    cache = model.new_cache(2, 40, rollback=rollback)
    model(torch.zeros(2, tokens, dtype=torch.int64), cache, logits_to_keep=0)
    return cache


def test_each_row_is_limited_by_its_rings(small_model: CausalLM) -> None:
    cache = filled(small_model)
    cache.truncate([28, 26])
    assert (cache.lengths, cache.length, cache.ragged) == ((28, 26), 28, True)
    with pytest.raises(
        UsageError, match="cannot roll back 5 tokens: this cache was allocated with `rollback` 4"
    ):
        cache.truncate([25, 26])
    with pytest.raises(UsageError, match="cannot truncate a cache of 26 tokens to 27"):
        cache.truncate([28, 27])
    assert cache.lengths == (28, 26)
    cache.truncate(26)
    assert (cache.lengths, cache.ragged) == ((26, 26), False)


def test_a_row_may_start_over_and_frees_its_tokens(small_model: CausalLM) -> None:
    cache = filled(small_model, tokens=40)
    with pytest.raises(UsageError, match="41 tokens do not fit the context of 40"):
        cache.check_capacity(1)
    cache.truncate([36, 0])
    cache.check_capacity(4)
    assert [int((positions[1] >= 0).sum()) for positions in cache.positions.values()] == [0, 0]


def test_lengths_for_another_number_of_rows_are_refused(small_model: CausalLM) -> None:
    with pytest.raises(UsageError, match="3 lengths for a cache of 2 sequences"):
        filled(small_model).truncate([1, 2, 3])
