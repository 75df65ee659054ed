"""Bytes that a decode step must read from memory, computed from a model's configuration."""

from __future__ import annotations

from dataclasses import dataclass

from moe_surgery.families.model_config import ModelConfig
from moe_surgery.formats.expert_format import BF16, MXFP4

__all__ = ["StepBytes", "bytes_per_token", "distinct_experts"]


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Least bytes that one decode step reads for `batch` sequences together, by kind."""

    experts: float
    attention: float
    router_and_norms: float
    cache: float
    vocabulary: float
    batch: int

    @property
    def step(self) -> float:
        return self.experts + self.attention + self.router_and_norms + self.cache + self.vocabulary

    @property
    def token(self) -> float:
        return self.step / self.batch


def distinct_experts(experts: int, top_k: int, batch: int) -> float:
    """Expected number of distinct experts of `batch` tokens under uniform routing: n (1 - (1 - k/n)^b).

    Real routing repeats itself, so it reads fewer.
    """
    return experts * (1 - (1 - min(top_k, experts) / experts) ** batch)


def bytes_per_token(
    config: ModelConfig,
    experts: int,
    batch: int,
    context: int,
    packed: bool = True,
) -> StepBytes:
    """Bytes a step must read with `experts` kept, `batch` sequences and `context` positions in the cache.

    `packed`: expert weights in MXFP4, else BF16. Activations are left out: they stay in the processor's caches.
    """
    c = config
    inner = c.intermediate_size
    heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    stored = MXFP4 if packed else BF16
    expert = stored.nbytes(3 * inner * c.hidden_size) + (2 * inner + c.hidden_size) * BF16.block_bytes
    attention = (
        heads * (c.hidden_size + 1)
        + (c.num_attention_heads * c.head_dim + 1) * c.hidden_size
        + c.num_attention_heads
    )
    positions = sum(context if w is None else min(context, w) for w in c.sliding_windows)
    return StepBytes(
        experts=c.num_hidden_layers * distinct_experts(experts, c.num_experts_per_tok, batch) * expert,
        attention=c.num_hidden_layers * attention * BF16.block_bytes,
        router_and_norms=(
            c.num_hidden_layers * (experts * (c.hidden_size + 1) + 2 * c.hidden_size) + c.hidden_size
        )
        * BF16.block_bytes,
        cache=batch * positions * 2 * c.num_key_value_heads * c.head_dim * BF16.block_bytes,
        vocabulary=(c.vocab_size + batch) * c.hidden_size * BF16.block_bytes,
        batch=batch,
    )
