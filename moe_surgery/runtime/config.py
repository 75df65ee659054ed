"""What the runtime needs to know of a model, read from either spelling of config.json."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from moe_surgery.checkpoint.text import describe
from moe_surgery.errors import CheckpointWarning, InvalidInputError
from moe_surgery.families import Model as Described

__all__ = ["ModelConfig", "RopeConfig"]

MAX_NUMBER = 10**9
# What transformers takes where config.json says nothing.
DEFAULT_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}
LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: plain (`factor` 1) or YaRN (arXiv 2309.00071) as gpt-oss uses it."""

    theta: float
    factor: float = 1.0
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder's dimensions and constants. `intermediate` is an expert's inner size. `windows[i]` is
    layer i's sliding window, None for full."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    experts: int
    top_k: int
    context: int
    windows: tuple[int | None, ...]
    rope: RopeConfig
    eps: float
    swiglu_limit: float
    swiglu_alpha: float
    stop_tokens: tuple[int, ...]
    model_type: str = "gpt_oss"

    @classmethod
    def of(cls, model: Described) -> ModelConfig:
        """The configuration of a described checkpoint. Raises InvalidInputError naming the key."""
        config = model.layout.hub_config(model.config) if model.layout.hub_config else model.config
        dims = model.dimensions
        if dims["heads"] % dims["kv_heads"]:
            raise InvalidInputError(
                f"config.json: {dims['heads']} attention heads do not share {dims['kv_heads']} key-value heads"
            )
        if dims["head_dim"] % 2:
            raise InvalidInputError(f"config.json: head_dim is {dims['head_dim']}; rotation needs pairs")
        return cls(
            layers=dims["layers"],
            hidden=dims["hidden"],
            intermediate=dims["intermediate"],
            heads=dims["heads"],
            kv_heads=dims["kv_heads"],
            head_dim=dims["head_dim"],
            vocabulary=dims["vocabulary"],
            experts=dims["experts"],
            top_k=dims["top_k"],
            context=_whole(config, "max_position_embeddings", 131072),
            windows=_windows(config, dims["layers"]),
            rope=_rope(config),
            eps=_number(config, "rms_norm_eps", 1e-5),
            swiglu_limit=_number(config, "swiglu_limit", 7.0),
            swiglu_alpha=_number(config, "swiglu_alpha", 1.702),
            stop_tokens=token_ids(config.get("eos_token_id")),
            model_type=model.model_type,
        )


def token_ids(value: object) -> tuple[int, ...]:
    """Token numbers of a config value that may be a number, a list or null; others are no tokens."""
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if type(v) is int and 0 <= v < MAX_NUMBER)


def _number(config: Mapping[str, object], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < MAX_NUMBER:
        raise InvalidInputError(f"config.json: {key} is {describe(value)}, not a number above 0")
    return float(value)


def _whole(config: Mapping[str, object], key: str, default: int) -> int:
    value = _number(config, key, default)
    if value != int(value):
        raise InvalidInputError(f"config.json: {key} is {value}, not a whole number")
    return int(value)


def _windows(config: Mapping[str, object], layers: int) -> tuple[int | None, ...]:
    """Sliding layers see `sliding_window` positions; without "layer_types" every second layer slides."""
    kinds = config.get("layer_types") or [
        ("sliding_attention", "full_attention")[i % 2] for i in range(layers)
    ]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise InvalidInputError(f"config.json: layer_types does not list {layers} layers")
    if unknown := set(map(str, kinds)) - {"sliding_attention", "full_attention"}:
        raise InvalidInputError(
            f"config.json: layer_types holds {describe(min(unknown))}; "
            "known: sliding_attention, full_attention"
        )
    window = _whole(config, "sliding_window", 128) if "sliding_attention" in kinds else None
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(config: Mapping[str, object]) -> RopeConfig:
    """transformers 5 writes `rope_parameters`, older versions `rope_scaling` and `rope_theta`.

    Where both are there, transformers (`convert_rope_params_to_dict`) takes `rope_scaling`; a
    `rope_theta` inside goes before one outside.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    said = config.get(key) or DEFAULT_ROPE
    if key == "rope_scaling" and config.get("rope_parameters") not in (None, {}, said):
        warnings.warn(
            "config.json: rope_scaling and rope_parameters differ; transformers and moe-surgery use rope_scaling",
            CheckpointWarning,
            stacklevel=3,
        )
    if not isinstance(said, dict):
        raise InvalidInputError(f"config.json: {key} is not an object")
    if layered := sorted(said.keys() & LAYER_TYPES):
        raise InvalidInputError(
            f"config.json: {key} has an entry for {layered[0]}; gpt-oss has one rotary embedding for all layers"
        )
    theta = _number(said, "rope_theta", _number(config, "rope_theta", 150000.0))
    if theta <= 1:
        raise InvalidInputError(f"config.json: rope_theta is {theta}, not above 1")
    kind = said.get("rope_type", said.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta)
    if kind != "yarn":
        raise InvalidInputError(f"config.json: rope_type is {describe(kind)}; known: default, yarn")
    if "factor" not in said:
        raise InvalidInputError(f"config.json: {key} has no factor, which yarn needs")
    factor = _number(said, "factor", 1.0)
    given = said.get("attention_factor")
    # Outside the object it goes first; the model's context is the last resort, as in transformers.
    length = "original_max_position_embeddings"
    outer = config if config.get(length) is not None else said
    return RopeConfig(
        theta,
        factor,
        _whole(outer, length, _whole(config, "max_position_embeddings", 131072)),
        _number(said, "beta_fast", 32.0),
        _number(said, "beta_slow", 1.0),
        bool(said.get("truncate", True)),
        _mscale(said, factor) if given is None else _number(said, "attention_factor", 1.0),
    )


def _mscale(rope: Mapping[str, object], factor: float) -> float:
    """What YaRN multiplies cos and sin with where `attention_factor` does not say it."""

    def scale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(_number(rope, "mscale", 1.0)) / scale(_number(rope, "mscale_all_dim", 1.0))
    return scale(1.0)
