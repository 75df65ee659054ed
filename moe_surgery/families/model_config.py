"""What running or exporting a model needs of its config.json, whatever its keys are called there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_surgery.families.model_spec import ModelSpec

__all__ = ["ModelConfig", "RopeConfig", "token_ids"]

MAX_TOKEN_ID = 10**9


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
    def of(cls, model: ModelSpec) -> ModelConfig:
        """The configuration of an identified checkpoint, as its family reads it.

        Raises InvalidInputError naming the key.
        """
        return model.family.read_config(model)


def token_ids(value: object) -> tuple[int, ...]:
    """Token ids of a config value that may be a number, a list or null; anything else is ignored."""
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if type(v) is int and 0 <= v < MAX_TOKEN_ID)
