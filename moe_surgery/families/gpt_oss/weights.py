"""Which tensors of gpt-oss make which part of a layer. Each name is written here, and only here."""

from __future__ import annotations

from typing import Final

from moe_surgery.families.base import LayerNames, ProjectionNames, WeightNames

__all__ = ["WEIGHTS"]

_LAYER: Final = "model.layers.{layer}."
_ATTENTION: Final = _LAYER + "self_attn."
_MLP: Final = _LAYER + "mlp."


def _projection(name: str) -> ProjectionNames:
    return ProjectionNames(name + ".weight", name + ".bias")


WEIGHTS: Final = WeightNames(
    embedding="model.embed_tokens.weight",
    norm="model.norm.weight",
    unembedding="lm_head.weight",
    layer=LayerNames(
        attention_norm=_LAYER + "input_layernorm.weight",
        q=_projection(_ATTENTION + "q_proj"),
        k=_projection(_ATTENTION + "k_proj"),
        v=_projection(_ATTENTION + "v_proj"),
        o=_projection(_ATTENTION + "o_proj"),
        sinks=_ATTENTION + "sinks",
        mlp_norm=_LAYER + "post_attention_layernorm.weight",
        router=_projection(_MLP + "router"),
        gate_up=_MLP + "experts.gate_up_proj",
        gate_up_bias=_MLP + "experts.gate_up_proj_bias",
        down=_MLP + "experts.down_proj",
        down_bias=_MLP + "experts.down_proj_bias",
    ),
)
