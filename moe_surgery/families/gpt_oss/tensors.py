"""gpt-oss's tensors: shapes and roles, and their names in the hub's layout and in OpenAI's own."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from moe_surgery.families.base import Layout, Role, StoredAs, Tensor, WeightNames
from moe_surgery.families.gpt_oss.config_keys import ORIGINAL_DIMENSIONS
from moe_surgery.families.gpt_oss.weights import WEIGHTS

__all__ = ["HUB", "ORIGINAL", "TENSORS", "tensors"]

_BIAS: Final = ("attention_bias", True)


def tensors(names: WeightNames) -> tuple[Tensor, ...]:
    """The tensors of a model built like gpt-oss, called `names`, in the order of the hub's checkpoints."""
    layer = names.layer
    return (
        Tensor(names.embedding, ("vocabulary", "hidden"), Role.EMBEDDING),
        Tensor(layer.attention_norm, ("hidden",), Role.NORM),
        Tensor(layer.q.weight, ("heads*head_dim", "hidden"), Role.ATTENTION),
        Tensor(layer.q.bias, ("heads*head_dim",), Role.ATTENTION, present_if=_BIAS),
        Tensor(layer.k.weight, ("kv_heads*head_dim", "hidden"), Role.ATTENTION),
        Tensor(layer.k.bias, ("kv_heads*head_dim",), Role.ATTENTION, present_if=_BIAS),
        Tensor(layer.v.weight, ("kv_heads*head_dim", "hidden"), Role.ATTENTION),
        Tensor(layer.v.bias, ("kv_heads*head_dim",), Role.ATTENTION, present_if=_BIAS),
        Tensor(layer.o.weight, ("hidden", "heads*head_dim"), Role.ATTENTION),
        Tensor(layer.o.bias, ("hidden",), Role.ATTENTION, present_if=_BIAS),
        Tensor(layer.sinks, ("heads",), Role.ATTENTION),
        Tensor(layer.mlp_norm, ("hidden",), Role.NORM),
        Tensor(layer.router.weight, ("experts", "hidden"), Role.ROUTER),
        Tensor(layer.router.bias, ("experts",), Role.ROUTER),
        Tensor(layer.gate_up, ("experts", "2*intermediate", "hidden"), Role.EXPERT_WEIGHT),
        Tensor(layer.gate_up_bias, ("experts", "2*intermediate"), Role.EXPERT_BIAS),
        Tensor(layer.down, ("experts", "hidden", "intermediate"), Role.EXPERT_WEIGHT),
        Tensor(layer.down_bias, ("experts", "hidden"), Role.EXPERT_BIAS),
        Tensor(names.norm, ("hidden",), Role.NORM),
        Tensor(
            names.unembedding,
            ("vocabulary", "hidden"),
            Role.UNEMBEDDING,
            present_if=("!tie_word_embeddings", True),
        ),
    )


TENSORS: Final = tensors(WEIGHTS)

_LAYER: Final = WEIGHTS.layer
_BLOCK: Final = "block.{layer}."
_QKV_ROWS: Final = "heads*head_dim+2*kv_heads*head_dim"
_ORIGINAL_NAMES: Final = {
    WEIGHTS.embedding: StoredAs("embedding.weight"),
    WEIGHTS.norm: StoredAs("norm.scale"),
    WEIGHTS.unembedding: StoredAs("unembedding.weight"),
    _LAYER.attention_norm: StoredAs(_BLOCK + "attn.norm.scale"),
    _LAYER.mlp_norm: StoredAs(_BLOCK + "mlp.norm.scale"),
    _LAYER.sinks: StoredAs(_BLOCK + "attn.sinks"),
    _LAYER.o.weight: StoredAs(_BLOCK + "attn.out.weight"),
    _LAYER.o.bias: StoredAs(_BLOCK + "attn.out.bias"),
    _LAYER.router.weight: StoredAs(_BLOCK + "mlp.gate.weight"),
    _LAYER.router.bias: StoredAs(_BLOCK + "mlp.gate.bias"),
    _LAYER.gate_up: StoredAs(_BLOCK + "mlp.mlp1_weight"),
    _LAYER.gate_up_bias: StoredAs(_BLOCK + "mlp.mlp1_bias"),
    _LAYER.down: StoredAs(_BLOCK + "mlp.mlp2_weight"),
    _LAYER.down_bias: StoredAs(_BLOCK + "mlp.mlp2_bias"),
} | {
    name: StoredAs(_BLOCK + f"attn.qkv.{leaf}", start, _QKV_ROWS)
    for projection, start in (
        (_LAYER.q, "0"),
        (_LAYER.k, "heads*head_dim"),
        (_LAYER.v, "heads*head_dim+kv_heads*head_dim"),
    )
    for name, leaf in ((projection.weight, "weight"), (projection.bias, "bias"))
}


def _hub_config(original: Mapping[str, object]) -> dict[str, object]:
    from moe_surgery.families.gpt_oss.original import hub_config

    return hub_config(original)


HUB: Final = Layout("hub", "transformers")
ORIGINAL: Final = Layout(
    "original",
    "OpenAI's code",
    names=MappingProxyType(_ORIGINAL_NAMES),
    blocks=".blocks",
    scales=".scales",
    side_files_dropped=frozenset({"dtypes.json"}),
    parent_side_files=(
        "LICENSE",
        "README.md",
        "USAGE_POLICY",
        "chat_template.jinja",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ),
    hub_config=_hub_config,
    dimensions=ORIGINAL_DIMENSIONS,
)
