"""The texts of a repair: passages to train on, passages held out, and batches of them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from moe_surgery.errors import UsageError
from moe_surgery.quality.corpus import Passage

__all__ = ["Sample", "as_samples", "shuffled_batches", "split_held_out", "token_batches"]


@dataclass(frozen=True, slots=True)
class Sample:
    """A passage whose positions [start, start + count) predict a token that counts; `row` is the first of them in
    the stored targets."""

    domain: str
    tokens: tuple[int, ...]
    start: int
    count: int
    row: int = 0


def as_samples(passages: Iterable[Passage], answers_only: bool) -> list[Sample]:
    """Passages with at least one token to predict; with `answers_only` only tokens of answers count."""
    samples = []
    for passage in passages:
        first = 1
        if answers_only:
            first = len(passage.tokens) if passage.answer is None else max(1, passage.answer)
        if (count := len(passage.tokens) - first) > 0:
            samples.append(Sample(passage.domain, passage.tokens, first - 1, count))
    return samples


def split_held_out(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Samples to train on and samples held out: of every domain whole passages, drawn by `seed`, until `share` of its
    predicted tokens are held out. A domain of one passage is cut in two.

    Raises UsageError for a domain with fewer than four tokens to predict.
    """
    train: list[Sample] = []
    held: list[Sample] = []
    for domain in dict.fromkeys(s.domain for s in samples):
        mine = [s for s in samples if s.domain == domain]
        wanted = share * sum(s.count for s in mine)
        if len(mine) == 1:
            mine = _halves(mine[0], share)
        order = list(range(len(mine)))
        if len(order) > 2:
            random.Random(f"{domain} held out {seed}").shuffle(order)
        out: set[int] = set()
        count = 0
        for i in reversed(order[1:]):
            if count >= wanted:
                break
            out.add(i)
            count += mine[i].count
        train += [s for i, s in enumerate(mine) if i not in out]
        held += [s for i, s in enumerate(mine) if i in out]
    return train, held


def _halves(sample: Sample, share: float) -> list[Sample]:
    """The beginning of a passage, and the last `share` of what it predicts as a passage by itself."""
    last = max(1, round(share * sample.count))
    cut = sample.start + sample.count - last
    if cut - sample.start < 1 or sample.count < 4:
        raise UsageError(
            f"domain {sample.domain!r}: {sample.count} tokens to predict are too few to train on some and hold out "
            "others; give longer texts"
        )
    return [
        replace(sample, tokens=sample.tokens[: cut + 1], count=cut - sample.start),
        Sample(sample.domain, sample.tokens[cut:], 0, last),
    ]


def token_batches(samples: Sequence[Sample], tokens: int) -> Iterator[list[Sample]]:
    """Samples in order, in groups of at most `tokens` tokens (a longer one is a group by itself)."""
    group: list[Sample] = []
    size = 0
    for sample in samples:
        if group and size + len(sample.tokens) > tokens:
            yield group
            group, size = [], 0
        group.append(sample)
        size += len(sample.tokens)
    if group:
        yield group


def shuffled_batches(samples: Sequence[Sample], tokens: int, seed: int) -> Iterator[list[Sample]]:
    """Batches without end: all samples in an order drawn by `seed`, then in another, and so on."""
    epoch = 0
    while True:
        order = list(samples)
        random.Random(f"batches {seed} {epoch}").shuffle(order)
        yield from token_batches(order, tokens)
        epoch += 1
