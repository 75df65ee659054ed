"""gpt-oss (20b, 120b) in the hub's layout and in OpenAI's own (`original/`)."""

from __future__ import annotations

from typing import Final

from moe_surgery.families.base import Family
from moe_surgery.families.gpt_oss.config import (
    CONFIG_KEYS,
    DIMENSIONS,
    QUANTIZATION_CONFIG,
    read_config,
)
from moe_surgery.families.gpt_oss.gguf import GGUF
from moe_surgery.families.gpt_oss.tensors import HUB, ORIGINAL, TENSORS
from moe_surgery.families.gpt_oss.weights import WEIGHTS

__all__ = ["GPT_OSS"]

GPT_OSS: Final = Family(
    model_type="gpt_oss",
    title="gpt-oss",
    dimensions=DIMENSIONS,
    tensors=TENSORS,
    layouts=(HUB, ORIGINAL),
    quantization_config=QUANTIZATION_CONFIG,
    config_keys=CONFIG_KEYS,
    read_config=read_config,
    weights=WEIGHTS,
    gguf=GGUF,
)
