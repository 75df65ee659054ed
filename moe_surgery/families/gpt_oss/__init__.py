"""gpt-oss (20b, 120b) in the hub's layout and in OpenAI's own (`original/`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from moe_surgery.families.base import Family
from moe_surgery.families.gpt_oss.config_keys import CONFIG_KEYS, DIMENSIONS, QUANTIZATION_CONFIG
from moe_surgery.families.gpt_oss.tensors import HUB, ORIGINAL, TENSORS
from moe_surgery.families.gpt_oss.weights import WEIGHTS

if TYPE_CHECKING:
    from moe_surgery.families.gguf_architecture import GgufArchitecture
    from moe_surgery.families.model_config import ModelConfig
    from moe_surgery.families.model_spec import ModelSpec

__all__ = ["GPT_OSS"]


def _read_config(model: ModelSpec) -> ModelConfig:
    from moe_surgery.families.gpt_oss.config import read_config

    return read_config(model)


def _gguf() -> GgufArchitecture:
    from moe_surgery.families.gpt_oss.gguf import GGUF

    return GGUF


GPT_OSS: Final = Family(
    model_type="gpt_oss",
    title="gpt-oss",
    dimensions=DIMENSIONS,
    tensors=TENSORS,
    layouts=(HUB, ORIGINAL),
    quantization_config=QUANTIZATION_CONFIG,
    config_keys=CONFIG_KEYS,
    read_config=_read_config,
    weights=WEIGHTS,
    gguf=_gguf,
)
