"""A model family in llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moe_surgery.families.base import WeightNames
from moe_surgery.families.model_config import ModelConfig
from moe_surgery.families.model_spec import ModelSpec

__all__ = ["GgufArchitecture"]


@dataclass(frozen=True, slots=True)
class GgufArchitecture:
    """A family in llama.cpp.

    `names` maps each tensor to its name in GGUF, or to two for one whose rows alternate between two GGUF
    tensors. `metadata` returns the architecture's keys for the number of experts kept and of active
    experts: an int is written as u32, a float as f32. `unsupported` says what llama.cpp would compute
    differently, or returns None.
    """

    architecture: str
    names: Callable[[WeightNames], Mapping[str, tuple[str, ...]]]
    metadata: Callable[[ModelConfig, int, int], Mapping[str, int | float | str]]
    unsupported: Callable[[ModelSpec, ModelConfig], str | None]
