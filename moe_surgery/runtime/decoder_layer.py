"""One decoder layer: attention and mixture of experts, each behind an RMSNorm and added to the residual.

The only place that composes the operations of a `Backend` into a layer; fused forms (`Backend.fuse_layers`,
`Backend.decode_step`) are tested against it. What differs between callers is how queries meet keys: with a
KV cache (`runtime.model`) or within whole passages (`quality.layerwise`). They pass that as `attend`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from moe_surgery.families.model_config import ModelConfig
from moe_surgery.kernels import Backend
from moe_surgery.kernels.weights import Layer

__all__ = ["Attend", "attention_block", "decoder_layer", "moe_block", "route"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [..., num_heads, head_dim], k and v [..., num_kv_heads, head_dim], q and k rotated
-> [..., num_heads * head_dim]."""


def decoder_layer(
    backend: Backend,
    config: ModelConfig,
    layer: Layer,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    attend: Attend,
) -> Tensor:
    """Hidden states x [..., hidden] after `layer`; cos and sin as for `attention_block`."""
    x = attention_block(backend, config, layer, x, cos, sin, attend)
    return moe_block(backend, config, layer, x)[0]


def attention_block(
    backend: Backend,
    config: ModelConfig,
    layer: Layer,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    attend: Attend,
) -> Tensor:
    """x + self-attention of norm(x), for x [..., hidden] with one or two leading axes.

    cos and sin float32 [..., head_dim / 2] are those of each token's position.
    """
    h = backend.rms_norm(x, layer.attention_norm, config.rms_norm_eps)
    q, k, v = (
        y.view(*x.shape[:-1], -1, config.head_dim)
        for y in backend.multi_linear(h, [layer.q.pair, layer.k.pair, layer.v.pair])
    )
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # the same for every head
    q, k = backend.apply_rope(q, cos, sin), backend.apply_rope(k, cos, sin)
    return x + backend.linear(attend(q, k, v), *layer.o.pair)


def moe_block(
    backend: Backend, config: ModelConfig, layer: Layer, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """x + the weighted outputs of the experts chosen for norm(x), for x [..., hidden]; and `Backend.route`'s
    choice, ids int64 and weights [tokens, top_k]."""
    h, ids, weights = route(backend, config, layer, x.view(-1, x.shape[-1]))
    return x + backend.experts(h, ids, weights, layer.experts).view(x.shape), ids, weights


def route(backend: Backend, config: ModelConfig, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The experts' input norm(x) [tokens, hidden] for x [tokens, hidden], and `Backend.route`'s choice for it:
    ids int64 and weights [tokens, top_k]."""
    h = backend.rms_norm(x, layer.mlp_norm, config.rms_norm_eps)
    assert layer.router.bias is not None
    return (h, *backend.route(h, layer.router.weight, layer.router.bias, layer.top_k))
