"""What a decode step costs, counted: kernel launches, and bytes that have to be read from memory."""

from __future__ import annotations

from dataclasses import dataclass

from moe_surgery.formats.sizes import BF16_BYTES, MXFP4_BYTES
from moe_surgery.runtime.config import ModelConfig

__all__ = ["Launches", "StepBytes", "bytes_per_token", "describe_step", "distinct_experts", "launch_count"]

# Assignments that the sorted way schedules in one launch (`kernels.triton.dispatch.ONE_LAUNCH`).
SCHEDULED_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Launches:
    """Kernel launches of one captured decode step: `moe` of the `layer` ones route and compute the experts."""

    layer: int
    moe: int
    outside: int
    layers: int

    @property
    def step(self) -> int:
        return self.layers * self.layer + self.outside


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Bytes that one decode step reads at least, by what they are, for `batch` sequences together."""

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


def launch_count(config: ModelConfig, experts: int, batch: int) -> Launches:
    """Launches of `DecodeStep` for `batch` sequences with `experts` kept.

    At one token RMSNorm is part of the projection that follows it. Few (token, expert) pairs take two
    launches for the experts, more take four: schedule, gate_up, down, sum (five beyond 1024 pairs).
    """
    top_k = min(config.top_k, experts)
    pairs = batch * top_k
    sorted_launches = 4 if pairs <= SCHEDULED_AT_ONCE else 5
    expert_launches = 2 if batch == 1 or pairs <= min(16, 2 * experts) else sorted_launches
    norms = 1 if batch == 1 else 2
    moe = 1 + expert_launches
    return Launches(layer=norms + 3 + moe, moe=moe, outside=norms, layers=config.layers)


def distinct_experts(experts: int, top_k: int, batch: int) -> float:
    """How many experts `batch` tokens touch on average if every choice is as likely: experts (1 - (1 - k/n)^b).

    Real routing repeats itself more, so fewer are touched.
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

    `packed`: expert weights in MXFP4, else BF16. Activations are left out: they stay in the chip's caches.
    """
    c = config
    inner = c.intermediate
    heads = (c.heads + 2 * c.kv_heads) * c.head_dim
    width = MXFP4_BYTES if packed else BF16_BYTES
    expert = 3 * inner * c.hidden * width + (2 * inner + c.hidden) * BF16_BYTES
    attention = heads * (c.hidden + 1) + (c.heads * c.head_dim + 1) * c.hidden + c.heads
    positions = sum(context if w is None else min(context, w) for w in c.windows)
    return StepBytes(
        experts=c.layers * distinct_experts(experts, c.top_k, batch) * expert,
        attention=c.layers * attention * BF16_BYTES,
        router_and_norms=(c.layers * (experts * (c.hidden + 1) + 2 * c.hidden) + c.hidden) * BF16_BYTES,
        cache=batch * positions * 2 * c.kv_heads * c.head_dim * BF16_BYTES,
        vocabulary=(c.vocabulary + batch) * c.hidden * BF16_BYTES,
        batch=batch,
    )


def describe_step(config: ModelConfig, experts: int, batch: int, context: int, packed: bool = True) -> str:
    """Launches and bytes of a step in a few lines of text."""
    launches = launch_count(config, experts, batch)
    read = bytes_per_token(config, experts, batch, context, packed)
    parts = ("experts", "attention", "router_and_norms", "cache", "vocabulary")
    shares = ", ".join(f"{part.replace('_', ' ')} {getattr(read, part) / 1e9:.3f}" for part in parts)
    return (
        f"{experts} experts, batch {batch}, context {context}: {launches.step} launches a step "
        f"({launches.layer} a layer, {launches.moe} of them MoE, and {launches.outside}); "
        f"{read.step / 1e9:.3f} GB a step, {read.token / 1e9:.3f} GB a token\n"
        f"  GB: {shares}"
    )
