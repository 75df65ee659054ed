"""A family with gpt-oss's structure and other names: everything needed to add one."""

from __future__ import annotations

from dataclasses import replace

from moe_surgery.families.base import ConfigKey, Family, LayerNames, Layout, ProjectionNames, WeightNames
from moe_surgery.families.gpt_oss import GPT_OSS
from moe_surgery.families.gpt_oss.tensors import tensors

WEIGHTS = WeightNames(
    embedding="wte.weight",
    norm="ln_f.weight",
    unembedding="output.weight",
    layer=LayerNames(
        attention_norm="decoder.blocks.{layer}.ln_1.weight",
        q=ProjectionNames("decoder.blocks.{layer}.mixer.wq.weight", "decoder.blocks.{layer}.mixer.wq.bias"),
        k=ProjectionNames("decoder.blocks.{layer}.mixer.wk.weight", "decoder.blocks.{layer}.mixer.wk.bias"),
        v=ProjectionNames("decoder.blocks.{layer}.mixer.wv.weight", "decoder.blocks.{layer}.mixer.wv.bias"),
        o=ProjectionNames("decoder.blocks.{layer}.mixer.wo.weight", "decoder.blocks.{layer}.mixer.wo.bias"),
        sinks="decoder.blocks.{layer}.mixer.sink_logits",
        mlp_norm="decoder.blocks.{layer}.ln_2.weight",
        router=ProjectionNames(
            "decoder.blocks.{layer}.moe.gate.weight", "decoder.blocks.{layer}.moe.gate.bias"
        ),
        gate_up="decoder.blocks.{layer}.moe.bank.w13",
        gate_up_bias="decoder.blocks.{layer}.moe.bank.w13_bias",
        down="decoder.blocks.{layer}.moe.bank.w2",
        down_bias="decoder.blocks.{layer}.moe.bank.w2_bias",
    ),
)


def other_key(key: ConfigKey) -> ConfigKey:
    return key._replace(keys=tuple(f"x_{k}" for k in key.keys), unread=())


PRETEND: Family = replace(
    GPT_OSS,
    model_type="pretend",
    title="pretend",
    weights=WEIGHTS,
    tensors=tensors(WEIGHTS),
    layouts=(Layout("hub", "transformers"),),
    dimensions={name: other_key(key) for name, key in GPT_OSS.dimensions.items()},
    config_keys={name: other_key(key) for name, key in GPT_OSS.config_keys.items()},
)
