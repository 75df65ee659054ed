"""Reads config.json of gpt-oss in the hub's layout, for running and exporting."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from moe_surgery.checkpoint.text import describe_value
from moe_surgery.errors import CheckpointWarning, InvalidInputError
from moe_surgery.families.base import ConfigKey
from moe_surgery.families.model_config import ModelConfig, RopeParameters, token_ids
from moe_surgery.families.model_spec import ModelSpec

__all__ = ["number", "read_config"]

MAX_NUMBER: Final = 10**9
# transformers' default.
DEFAULT_ROPE: Final = MappingProxyType(
    {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    }
)
LAYER_TYPES: Final = ("sliding_attention", "full_attention")


def read_config(model: ModelSpec) -> ModelConfig:
    """The configuration of a model built like gpt-oss, by its family's `config_keys`.

    Raises InvalidInputError naming the key.
    """
    config, dims = _Config(model.hub_config, model.described.config_keys), model.dimensions
    if dims["heads"] % dims["kv_heads"]:
        raise InvalidInputError(
            f"config.json: {dims['heads']} attention heads are not a multiple of {dims['kv_heads']} key-value heads"
        )
    if dims["head_dim"] % 2:
        raise InvalidInputError(
            f"config.json: head_dim is {dims['head_dim']}; rotary embedding needs an even number"
        )
    return ModelConfig(
        num_hidden_layers=dims["layers"],
        hidden_size=dims["hidden"],
        intermediate_size=dims["intermediate"],
        num_attention_heads=dims["heads"],
        num_key_value_heads=dims["kv_heads"],
        head_dim=dims["head_dim"],
        vocab_size=dims["vocabulary"],
        num_local_experts=dims["experts"],
        num_experts_per_tok=dims["top_k"],
        max_position_embeddings=config.whole("max_position_embeddings"),
        sliding_windows=_sliding_windows(config, dims["layers"]),
        rope_parameters=_rope_parameters(config, model.family.title),
        rms_norm_eps=config.number("rms_norm_eps"),
        swiglu_limit=config.number("swiglu_limit"),
        swiglu_alpha=config.number("swiglu_alpha"),
        eos_token_ids=token_ids(config.get("eos_token_id")),
        model_type=model.model_type,
    )


def number(config: Mapping[str, object], key: str, default: float | None) -> float:
    """The number above 0 under `key`. Raises InvalidInputError for another value, and where there is none."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < MAX_NUMBER:
        raise InvalidInputError(f"config.json: {key} is {describe_value(value)}, not a number above 0")
    return value


def _whole(config: Mapping[str, object], key: str, default: float | None) -> int:
    value = float(number(config, key, default))
    if value != int(value):
        raise InvalidInputError(f"config.json: {key} is {value}, not a whole number")
    return int(value)


class _Config:
    """config.json read by the names of a family's `config_keys`."""

    def __init__(self, values: Mapping[str, object], keys: Mapping[str, ConfigKey]) -> None:
        self._values, self._keys = values, keys

    def key(self, name: str) -> str:
        """The key in config.json; the first spelling where none is there."""
        keys = self._keys[name].keys
        return next((k for k in keys if k in self._values), keys[0])

    def get(self, name: str) -> object:
        return self._values.get(self.key(name))

    def number(self, name: str) -> float:
        return float(number(self._values, self.key(name), self._keys[name].default))

    def whole(self, name: str) -> int:
        return _whole(self._values, self.key(name), self._keys[name].default)


def _sliding_windows(config: _Config, layers: int) -> tuple[int | None, ...]:
    """Sliding layers see `sliding_window` positions; without "layer_types" every second layer is one."""
    kinds = config.get("layer_types") or [LAYER_TYPES[i % 2] for i in range(layers)]
    key = config.key("layer_types")
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise InvalidInputError(f"config.json: {key} does not list {layers} layers")
    if unknown := set(map(str, kinds)) - set(LAYER_TYPES):
        raise InvalidInputError(
            f"config.json: {key} holds {describe_value(min(unknown))}; known: {', '.join(LAYER_TYPES)}"
        )
    window = config.whole("sliding_window") if LAYER_TYPES[0] in kinds else None
    return tuple(window if kind == LAYER_TYPES[0] else None for kind in kinds)


def _rope_parameters(config: _Config, title: str) -> RopeParameters:
    """transformers 5 writes `rope_parameters`, older versions `rope_scaling` and `rope_theta`.

    Where both exist, transformers (`convert_rope_params_to_dict`) uses `rope_scaling`; a
    `rope_theta` inside takes precedence over one outside.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    key, parameters = config.key(name), config.key("rope_parameters")
    rope = config.get(name) or dict(DEFAULT_ROPE)
    if name == "rope_scaling" and config.get("rope_parameters") not in (None, {}, rope):
        warnings.warn(
            f"config.json: {key} and {parameters} differ; transformers and moe-surgery use {key}",
            CheckpointWarning,
            stacklevel=5,
        )
    if not isinstance(rope, dict):
        raise InvalidInputError(f"config.json: {key} is not an object")
    if layered := sorted(rope.keys() & set(LAYER_TYPES)):
        raise InvalidInputError(
            f"config.json: {key} has an entry for {layered[0]}; {title} has one rotary embedding for all layers"
        )
    theta = float(number(rope, "rope_theta", config.number("rope_theta")))
    if theta <= 1:
        raise InvalidInputError(f"config.json: rope_theta is {theta}, not above 1")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return RopeParameters(theta)
    if kind != "yarn":
        raise InvalidInputError(f"config.json: rope_type is {describe_value(kind)}; known: default, yarn")
    if "factor" not in rope:
        raise InvalidInputError(f"config.json: {key} has no factor, which yarn needs")
    factor = float(number(rope, "factor", 1.0))
    attention_factor = rope.get("attention_factor")
    # Outside the object it takes precedence; the model's context is the fallback, as in transformers.
    context = config.whole("max_position_embeddings")
    outside = config.get("original_length") is not None
    length = (
        config.whole("original_length")
        if outside
        else _whole(rope, "original_max_position_embeddings", context)
    )
    return RopeParameters(
        theta,
        factor,
        length,
        float(number(rope, "beta_fast", 32.0)),
        float(number(rope, "beta_slow", 1.0)),
        bool(rope.get("truncate", True)),
        _mscale(rope, factor) if attention_factor is None else float(number(rope, "attention_factor", 1.0)),
    )


def _mscale(rope: Mapping[str, object], factor: float) -> float:
    """YaRN's factor on cos and sin where `attention_factor` is not given."""

    def scale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(number(rope, "mscale", 1.0)) / scale(number(rope, "mscale_all_dim", 1.0))
    return scale(1.0)
