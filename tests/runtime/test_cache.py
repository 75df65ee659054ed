"""However a text reaches the model (whole, in pieces, padded, rolled back), its logits are the same."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from moe_surgery.errors import UsageError  # noqa: E402
from moe_surgery.runtime import model as model_module  # noqa: E402
from moe_surgery.runtime.cache import Cache  # noqa: E402
from moe_surgery.runtime.load import load_model  # noqa: E402
from moe_surgery.runtime.model import CausalLM  # noqa: E402
from moe_surgery.runtime.text import Text  # noqa: E402
from tests.runtime.conftest import SMALL, WINDOW  # noqa: E402

# The native backend rounds otherwise in long steps; test_invariance.py compares its steps bit for bit.
TOLERANCE = {"reference": 1e-4, "native": 5e-3}
LENGTH = 40  # of texts for the small model: its rings go around several times


def text_of(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, SMALL.vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def close(model: CausalLM, got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE[model.backend.name])


def in_pieces(model: CausalLM, ids: torch.Tensor, cuts: list[int], rollback: int) -> torch.Tensor:
    """Logits of `ids` fed to one cache, cut before each of the tokens `cuts`."""
    cache = model.new_cache(ids.shape[0], ids.shape[1], rollback=rollback)
    edges = sorted({0, ids.shape[1], *cuts})
    return torch.cat([model(ids[:, a:b], cache) for a, b in pairwise(edges)], dim=1)


@given(
    seed=st.integers(0, 99),
    batch=st.integers(1, 3),
    cuts=st.lists(st.integers(1, LENGTH - 1), max_size=LENGTH),
    rollback=st.integers(0, 2 * WINDOW),
)
@settings(max_examples=15)
def test_any_split_gives_the_logits_of_the_whole(
    steady_model: CausalLM, seed: int, batch: int, cuts: list[int], rollback: int
) -> None:
    ids = text_of(seed, batch, LENGTH)
    close(steady_model, in_pieces(steady_model, ids, cuts, rollback), steady_model(ids))


@pytest.mark.parametrize("rollback", [0, 1, WINDOW, 3 * WINDOW])
@pytest.mark.parametrize("step", [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW])
def test_steps_of_every_size_around_the_window_agree(small_model: CausalLM, step: int, rollback: int) -> None:
    ids = text_of(step, 1, LENGTH)
    close(small_model, in_pieces(small_model, ids, [*range(0, LENGTH, step)], rollback), small_model(ids))


@pytest.mark.parametrize(
    ("cuts", "rollback"),
    [([*range(1, 150)], 16), ([*range(60, 150)], 0), ([70, 71, 140], 4), ([1, 65, 129], 16)],
    ids=["token by token", "prefill, then token by token", "few pieces", "pieces of the window"],
)
def test_the_embedded_model_goes_around_its_window(
    tiny_model: CausalLM, tiny_text: Text, cuts: list[int], rollback: int
) -> None:
    ids = torch.tensor([tiny_text.encode(Path(__file__).read_text())[:150]])
    close(tiny_model, in_pieces(tiny_model, ids, cuts, rollback), tiny_model(ids))


def test_long_inputs_in_chunks_agree_with_one_step(
    small_model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = text_of(0, 2, LENGTH)
    expected = small_model(ids)
    monkeypatch.setattr(model_module, "MAX_PREFILL_TOKENS", 7)
    close(small_model, small_model(ids), expected)
    monkeypatch.setattr(model_module, "SCORE_BYTES", 1)
    close(small_model, small_model(ids), expected)


@pytest.mark.parametrize("keep", [1, 2, 7, 8, LENGTH, 2 * LENGTH])
def test_the_last_logits_are_the_last_of_all(
    small_model: CausalLM, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = text_of(0, 2, LENGTH)
    monkeypatch.setattr(model_module, "MAX_PREFILL_TOKENS", 7)
    close(small_model, small_model(ids, logits_to_keep=keep), small_model(ids)[:, -keep:])


def test_a_prefill_may_keep_no_logits(small_model: CausalLM) -> None:
    ids, cache = text_of(0, 2, LENGTH), small_model.new_cache(2, LENGTH)
    assert small_model(ids[:, :-1], cache, logits_to_keep=0).shape == (2, 0, SMALL.vocabulary)
    close(small_model, small_model(ids[:, -1:], cache), small_model(ids)[:, -1:])


# --- left padding


@given(
    seed=st.integers(0, 99),
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=4),
    cuts=st.lists(st.integers(1, 24), max_size=3),
    steps=st.integers(0, 12),
    rollback=st.integers(0, WINDOW),
)
@settings(max_examples=15)
def test_a_left_padded_batch_gives_what_each_text_gives_alone(
    steady_model: CausalLM, seed: int, lengths: list[int], cuts: list[int], steps: int, rollback: int
) -> None:
    longest = max(lengths)
    ids = text_of(seed, len(lengths), longest + steps)
    mask = torch.stack([torch.arange(longest) >= longest - n for n in lengths]).long()
    cache = steady_model.new_cache(len(lengths), longest + steps, rollback=rollback)
    edges = sorted({0, longest, *(c for c in cuts if c < longest)})
    got = [steady_model(ids[:, a:b], cache, mask[:, a:b]) for a, b in pairwise(edges)]
    got += [steady_model(ids[:, c : c + 1], cache) for c in range(longest, longest + steps)]
    for row, length in enumerate(lengths):
        alone = steady_model(ids[row : row + 1, longest - length :])
        close(steady_model, torch.cat(got, dim=1)[row, longest - length :], alone[0])


def test_padding_gives_no_nan(small_model: CausalLM) -> None:
    ids = text_of(0, 2, 9)
    mask = torch.tensor([[0] * 8 + [1], [1] * 9])
    assert small_model(ids, None, mask).isfinite().all()


# --- rolling back


@st.composite
def edits(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """A rollback, and steps (tokens to roll back, tokens to add) that a cache with that rollback allows."""
    rollback, length, longest = draw(st.integers(0, 2 * WINDOW)), 0, 0
    steps = []
    for _ in range(draw(st.integers(1, 8))):
        least = max(0, longest - rollback)
        back = draw(st.integers(0, length - least)) if length > least else 0
        new = draw(st.integers(1, 12))
        steps.append((back, new))
        length += new - back
        longest = max(longest, length)
    return rollback, steps


@given(seed=st.integers(0, 99), plan=edits(), pads=st.integers(0, 3))
@settings(max_examples=15)
def test_other_tokens_after_a_truncation_give_what_a_fresh_run_gives(
    steady_model: CausalLM, seed: int, plan: tuple[int, list[tuple[int, int]]], pads: int
) -> None:
    rollback, steps = plan
    cache = steady_model.new_cache(2, 120, rollback=rollback)
    text, mask = torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64)
    for number, (back, new) in enumerate(steps):
        kept = text.shape[1] - back
        cache.truncate(kept)
        more = text_of(1000 * seed + number, 2, new)
        # The second text begins with padding, some of which may have been rolled back.
        real = torch.ones(2, new, dtype=torch.int64)
        real[1, : max(0, min(pads - kept, new))] = 0
        text, mask = torch.cat((text[:, :kept], more), 1), torch.cat((mask[:, :kept], real), 1)
        got = steady_model(more, cache, real)
        whole = steady_model(text, None, mask)[:, kept:]
        close(steady_model, got[mask[:, kept:] == 1], whole[mask[:, kept:] == 1])


def filled(model: CausalLM, length: int, rollback: int) -> Cache:
    cache = model.new_cache(1, 60, rollback=rollback)
    model(text_of(0, 1, length), cache, logits_to_keep=1)
    return cache


@pytest.mark.parametrize("rollback", [0, 1, 5])
def test_more_than_the_rollback_is_refused(small_model: CausalLM, rollback: int) -> None:
    cache = filled(small_model, LENGTH, rollback)
    with pytest.raises(UsageError) as caught:
        cache.truncate(LENGTH - rollback - 1)
    message = f"cannot roll back {rollback + 1} tokens: this cache was allocated with `rollback` {rollback}"
    assert str(caught.value) == message
    cache.truncate(LENGTH - rollback)
    assert cache.length == LENGTH - rollback


def test_rollbacks_do_not_add_up_past_what_the_rings_hold(small_model: CausalLM) -> None:
    cache = filled(small_model, LENGTH, 5)
    cache.truncate(LENGTH - 5)
    small_model(text_of(1, 1, 1), cache)
    with pytest.raises(UsageError, match="cannot roll back 6 tokens"):
        cache.truncate(LENGTH - 6)


@pytest.mark.parametrize("length", [-1, LENGTH + 1])
def test_a_length_that_never_was_is_refused(small_model: CausalLM, length: int) -> None:
    with pytest.raises(UsageError, match=f"cannot truncate a cache of {LENGTH} tokens to {length}"):
        filled(small_model, LENGTH, 5).truncate(length)


# --- capacity


def test_tokens_past_the_context_are_refused_before_anything_is_computed(
    small_model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "MAX_PREFILL_TOKENS", 4)
    ids, cache = text_of(0, 1, 20), small_model.new_cache(1, 19)
    small_model(ids[:, :5], cache)
    with pytest.raises(UsageError) as caught:
        small_model(ids[:, 5:], cache)
    assert str(caught.value) == (
        "20 tokens do not fit the context of 19; shorten the prompt or allocate a longer cache"
    )
    assert cache.length == 5
    close(small_model, small_model(ids[:, 5:19], cache), small_model(ids[:, :19])[:, 5:])


@pytest.mark.parametrize("context", [-1, 0, 4097])
def test_a_context_beyond_the_models_is_refused(small_model: CausalLM, context: int) -> None:
    with pytest.raises(UsageError, match=f"a context of {context} tokens; this model supports 1 to 4096"):
        small_model.new_cache(1, context)


@pytest.mark.parametrize("token", [-1, SMALL.vocabulary])
def test_a_token_outside_the_vocabulary_is_refused(small_model: CausalLM, token: int) -> None:
    with pytest.raises(UsageError, match=f"token {token} is not one of the model's {SMALL.vocabulary}"):
        small_model(torch.tensor([[1, token, 2]]))


def test_no_tokens_are_refused(small_model: CausalLM) -> None:
    with pytest.raises(UsageError, match="no tokens"):
        small_model(torch.zeros(1, 0, dtype=torch.int64), small_model.new_cache(1, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("context", [4, WINDOW, WINDOW + 5, 50])
@pytest.mark.parametrize("rollback", [0, 5])
def test_a_cache_takes_the_documented_bytes(
    small: Path, dtype: torch.dtype, context: int, rollback: int
) -> None:
    cache = load_model(small, dtype=dtype).new_cache(3, context, rollback=rollback)
    ring = min(context, WINDOW + rollback)
    tokens = ring + context + ring  # layers 0 and 2 slide
    assert cache.nbytes == 2 * 3 * tokens * SMALL.kv_heads * SMALL.head_dim * dtype.itemsize
