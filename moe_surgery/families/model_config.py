"""The values of config.json that running and exporting a model need, under the same names for every family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_surgery.families.model_spec import ModelSpec

__all__ = ["ModelConfig", "RopeParameters", "token_ids"]

MAX_TOKEN_ID = 10**9


@dataclass(frozen=True, slots=True)
class RopeParameters:
    """Rotary embedding: plain (`factor` 1) or YaRN (arXiv 2309.00071). Names are those of transformers'
    `rope_parameters`."""

    rope_theta: float
    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder's dimensions and constants, under the names that transformers' configurations give them.

    `intermediate_size` is an expert's. `sliding_windows[i]` is layer i's window in tokens, None for full
    attention.
    """

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    num_local_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    sliding_windows: tuple[int | None, ...]
    rope_parameters: RopeParameters
    rms_norm_eps: float
    swiglu_limit: float
    swiglu_alpha: float
    eos_token_ids: tuple[int, ...]
    model_type: str = "gpt_oss"

    @classmethod
    def of(cls, model: ModelSpec) -> ModelConfig:
        """The configuration of an identified checkpoint, as its family reads it.

        Raises InvalidInputError naming the key.
        """
        return model.described.read_config(model)


def token_ids(value: object) -> tuple[int, ...]:
    """Token ids of a config value that may be a number, a list or null; anything else is ignored."""
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if type(v) is int and 0 <= v < MAX_TOKEN_ID)
