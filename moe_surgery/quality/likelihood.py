"""How likely given tokens are, by several models, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_surgery.quality.candidates import Candidate
from moe_surgery.quality.corpus import Passage, batches
from moe_surgery.quality.layers import LayerModel
from moe_surgery.quality.own_layers import as_layers
from moe_surgery.runtime.model import CausalLM

__all__ = ["Likelihood", "log_likelihoods"]

BATCH_TOKENS = 8192
LOGIT_BYTES = 64 << 20


@dataclass(slots=True)
class Likelihood:
    """The sum of log-probabilities (nats) of a passage's answer, and whether each of its tokens is the most likely."""

    log_probability: float = 0.0
    greedy: bool = True


@dataclass(slots=True)
class _Input:
    """Tokens that predict, and the passages that continue them: those that differ in the last token share one."""

    tokens: tuple[int, ...]
    passages: list[int] = field(default_factory=list)


@torch.inference_mode()
def log_likelihoods(
    model: LayerModel | CausalLM,
    candidates: Sequence[Candidate],
    passages: Sequence[Passage],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> list[list[Likelihood]]:
    """For each of `candidates` the likelihood of each passage's tokens from `answer` (at least 1) on.

    `model` gives the layers of candidates that are views. Passages go through all candidates in batches of
    `batch_tokens`, layer by layer; those that differ in their last token only are computed once. An answer of no
    tokens has likelihood 1. `progress` is called with the number of passages finished.
    """
    model = as_layers(model)
    inputs: dict[tuple[int, ...], _Input] = {}
    for number, passage in enumerate(passages):
        assert passage.answer is not None
        if passage.answer < len(passage.tokens):
            given = passage.tokens[:-1]
            inputs.setdefault(given, _Input(given)).passages.append(number)
    results = [[Likelihood() for _ in passages] for _ in candidates]
    waiting = list(inputs.values())
    for group in batches([Passage("", each.tokens) for each in waiting], batch_tokens):
        now, waiting = waiting[: len(group)], waiting[len(group) :]
        _score(model, candidates, now, passages, results)
        if progress:
            progress(sum(len(each.passages) for each in now))
    return results


def _score(
    model: LayerModel,
    candidates: Sequence[Candidate],
    inputs: Sequence[_Input],
    passages: Sequence[Passage],
    results: Sequence[list[Likelihood]],
) -> None:
    """Fill in the `results` of the passages that continue `inputs`."""
    rows: list[int] = []
    tokens: list[int] = []
    owners: list[int] = []
    start = 0
    for each in inputs:
        for number in each.passages:
            passage = passages[number]
            assert passage.answer is not None
            predicted = range(passage.answer, len(passage.tokens))
            rows += [start + position - 1 for position in predicted]
            tokens += [passage.tokens[position] for position in predicted]
            owners += [number] * len(predicted)
        start += len(each.tokens)
    states = [(c.model or model).embed([each.tokens for each in inputs]) for c in candidates]
    for number in range(model.depth):
        for candidate, state in zip(candidates, states, strict=True):
            layer = candidate.enter(number, model, state)
            if layer is not None:
                layer.apply()
    step = max(1, LOGIT_BYTES // (model.vocab_size * 4))
    for first in range(0, len(rows), step):
        piece = slice(first, first + step)
        index, token = (torch.tensor(values[piece], dtype=torch.int64) for values in (rows, tokens))
        for candidate, state, likelihoods in zip(candidates, states, results, strict=True):
            log_p = torch.log_softmax((candidate.model or model).logits(state[index]), dim=-1)
            chosen, best = _of_tokens(log_p, token.to(log_p.device))
            for owner, value, greedy in zip(owners[piece], chosen, best, strict=True):
                likelihoods[owner].log_probability += value
                likelihoods[owner].greedy &= greedy


def _of_tokens(log_p: Tensor, token: Tensor) -> tuple[list[float], list[bool]]:
    """Log-probabilities of `token` [rows] in log_p [rows, vocabulary], and whether each is the most likely."""
    chosen = log_p.gather(1, token[:, None])[:, 0]
    return chosen.double().tolist(), (log_p.argmax(dim=-1) == token).tolist()
