"""Which texts are trained on and which held out."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

from moe_surgery.errors import UsageError
from moe_surgery.quality.corpus import Passage
from moe_surgery.quality.repair.samples import (
    Sample,
    as_samples,
    shuffled_batches,
    split_held_out,
    token_batches,
)

LENGTHS = st.lists(st.integers(2, 40), min_size=2, max_size=12)


def passages(domain: str, lengths: list[int]) -> list[Passage]:
    """With tokens that no other passage has."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [Passage(domain, tuple(range(a, a + n))) for a, n in zip(starts, lengths, strict=True)]


def predicted(samples: list[Sample]) -> list[tuple[str, int]]:
    return [(s.domain, token) for s in samples for token in s.tokens[s.start + 1 : s.start + 1 + s.count]]


@given(LENGTHS, LENGTHS, st.floats(0.05, 0.6), st.integers(0, 3))
def test_every_domain_has_both_kinds_and_nothing_is_lost_or_in_both(
    one: list[int], other: list[int], share: float, seed: int
) -> None:
    samples = as_samples([*passages("one", one), *passages("other", other)], answers_only=False)
    train, held = split_held_out(samples, share, seed)
    assert sorted(predicted(train) + predicted(held)) == sorted(predicted(samples))
    for domain in ("one", "other"):
        mine = [s.count for s in held if s.domain == domain]
        total = sum(s.count for s in samples if s.domain == domain)
        assert mine
        assert any(s.domain == domain for s in train)
        longest = max(s.count for s in samples if s.domain == domain)
        assert sum(mine) <= share * total + longest
    assert split_held_out(samples, share, seed) == (train, held)


@given(st.integers(5, 60), st.floats(0.05, 0.6))
def test_a_single_passage_is_cut_in_two(length: int, share: float) -> None:
    train, held = split_held_out(as_samples(passages("a", [length]), answers_only=False), share, 0)
    assert sorted(predicted(train) + predicted(held)) == [("a", token) for token in range(1, length)]


def test_too_short_a_text_is_refused() -> None:
    with pytest.raises(UsageError, match="domain 'a': 3 tokens to predict are too few"):
        split_held_out(as_samples(passages("a", [4]), answers_only=False), 0.2, 0)


def test_only_answers_count_where_asked_for() -> None:
    several = [Passage("a", (1, 2, 3, 4, 5), 3), Passage("a", (1, 2, 3)), Passage("a", (7, 8), 0)]
    assert as_samples(several, answers_only=True) == [
        Sample("a", (1, 2, 3, 4, 5), 2, 2),
        Sample("a", (7, 8), 0, 1),
    ]


@given(LENGTHS, st.integers(1, 60))
def test_batches_are_bounded_and_every_round_has_all(lengths: list[int], tokens: int) -> None:
    samples = as_samples(passages("a", lengths), answers_only=False)
    for group in token_batches(samples, tokens):
        assert len(group) == 1 or sum(len(s.tokens) for s in group) <= tokens
    stream = (s for batch in shuffled_batches(samples, tokens, 0) for s in batch)
    for _ in range(2):
        assert sorted(predicted(list(islice(stream, len(samples))))) == sorted(predicted(samples))
