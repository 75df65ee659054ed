"""Generation: prompts to tokens, as a stream or all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_surgery.errors import UsageError
from moe_surgery.runtime.cache import Cache
from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.sampling import Sampler, Sampling

__all__ = ["Generated", "Step", "clamp_new_tokens", "decoder", "generate", "pad_left", "stream"]


@dataclass(frozen=True, slots=True)
class Step:
    """One new token per sequence: int64 [batch], -1 where a sequence has ended, and its
    log-probability, float32 [batch]."""

    tokens: Tensor
    log_probabilities: Tensor


@dataclass(frozen=True, slots=True)
class Generated:
    """New tokens per sequence, the stop token included where one was met, and their
    log-probabilities."""

    tokens: list[list[int]]
    log_probabilities: list[list[float]]


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Prompts of any lengths as input_ids and attention_mask, int64 [batch, longest]."""
    if not prompts or not all(prompts):
        raise UsageError("the prompt is empty; give at least one token")
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(p)) + list(p) for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.int64)


@torch.inference_mode()
def stream(
    model: CausalLM,
    input_ids: Tensor | Sequence[Sequence[int]],
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] | None = None,
    context: int | None = None,
) -> Iterator[Step]:
    """Yield new tokens as they are generated, until every sequence has a stop token or `max_new_tokens`.

    `input_ids` int64 [batch, tokens] (left-padded, with `attention_mask`), or a list of prompts.
    `stop_tokens` default to the checkpoint's. `context` limits prompt and new tokens together.
    Raises UsageError where the prompt does not fit.
    """
    if not isinstance(input_ids, Tensor):
        input_ids, attention_mask = pad_left(input_ids)
    stops = torch.tensor(
        model.config.eos_token_ids if stop_tokens is None else stop_tokens, dtype=torch.int64
    )
    batch, tokens = input_ids.shape
    new = clamp_new_tokens(model, tokens, max_new_tokens, context)
    cache = model.new_cache(batch, tokens + new - 1)  # the last token is never fed back
    sampler = Sampler(sampling or Sampling())
    ended = torch.zeros(batch, dtype=torch.bool)
    mask = None if attention_mask is None else attention_mask.to(model.device)
    logits = model(input_ids, cache, mask, logits_to_keep=1)
    next_logits: Callable[[Tensor], Tensor] | None = None
    for remaining in reversed(range(new)):
        sampled, log_probability = sampler(logits[:, -1])
        tokens_cpu = sampled.cpu()
        yield Step(tokens_cpu.masked_fill(ended, -1), log_probability.cpu())
        ended |= torch.isin(tokens_cpu, stops)
        if ended.all() or not remaining:
            return
        next_logits = next_logits or decoder(model, cache)
        logits = next_logits(sampled)


def clamp_new_tokens(model: CausalLM, tokens: int, max_new_tokens: int, context: int | None) -> int:
    """How many new tokens fit after a prompt of `tokens`, at most `max_new_tokens`.

    Raises UsageError where none do, or where `context` exceeds the model's.
    """
    if max_new_tokens < 1:
        raise UsageError(f"`max_new_tokens` {max_new_tokens}: must be at least 1")
    limit = model.config.max_position_embeddings if context is None else context
    if not 1 <= limit <= model.config.max_position_embeddings:
        raise UsageError(
            f"`context` {limit}: this model supports 1 to {model.config.max_position_embeddings} tokens"
        )
    if tokens >= limit:
        raise UsageError(f"the prompt has {tokens} tokens, but the context is {limit}; shorten it")
    return min(max_new_tokens, limit - tokens)


def decoder(model: CausalLM, cache: Cache) -> Callable[[Tensor], Tensor]:
    """A function from the sampled tokens [batch] to the next logits [batch, 1, vocab_size].

    The backend's decode step where it has one; it may reuse the memory of its result.
    """
    step = model.decode_step(cache)
    if step is None:
        return lambda tokens: model(tokens[:, None], cache)
    return lambda tokens: step(tokens)[:, None]


def generate(
    model: CausalLM,
    input_ids: Tensor | Sequence[Sequence[int]],
    *,
    callback: Callable[[Step], None] | None = None,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] | None = None,
    context: int | None = None,
) -> Generated:
    """All new tokens at once; arguments as for `stream`. `callback` receives each step."""
    steps = stream(
        model,
        input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_tokens=stop_tokens,
        context=context,
    )
    sequences: list[tuple[list[int], list[float]]] = []
    for step in steps:
        sequences = sequences or [([], []) for _ in range(len(step.tokens))]
        values = zip(step.tokens.tolist(), step.log_probabilities.tolist(), strict=True)
        for (ids, log_probabilities), (token, log_probability) in zip(sequences, values, strict=True):
            if token >= 0:
                ids.append(token)
                log_probabilities.append(log_probability)
        if callback:
            callback(step)
    return Generated([ids for ids, _ in sequences], [values for _, values in sequences])
