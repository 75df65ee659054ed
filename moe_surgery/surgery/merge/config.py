"""adapter_config.json of a LoRA adapter: the scale of each update, and what cannot be merged."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from moe_surgery.checkpoint.text import describe_value, printable
from moe_surgery.errors import InvalidInputError

__all__ = ["LoraConfig", "parse_config"]

# Keys that change nothing in a merge of the saved tensors.
_NEUTRAL: Final = frozenset(
    {
        "alora_invocation_string",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_bias",
        "lora_dropout",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)
_READ: Final = frozenset(
    {
        "alpha_pattern",
        "init_lora_weights",
        "lora_alpha",
        "r",
        "rank_pattern",
        "target_parameters",
        "use_rslora",
    }
)
# Keys of variants of LoRA, and why each is not a plain low-rank update.
_VARIANTS: Final = {
    "use_dora": "DoRA rescales the rows of the merged weight",
    "use_qalora": "QALoRA adapts groups of inputs of a quantised weight",
    "use_bdlora": "its factors are block-diagonal",
    "alora_invocation_tokens": "an activated LoRA applies only after its invocation tokens",
    "arrow_config": "Arrow routes between adapters for each token",
    "layer_replication": "it repeats layers of the model",
    "trainable_token_indices": "it trains single rows of the embedding",
    "fan_in_fan_out": "its weights are stored transposed",
    "megatron_config": "its layers are Megatron's",
    "velora_config": "VeLoRA is not supported",
    "monteclora_config": "MonteCLoRA is not supported",
    "kasa_config": "KaSA changes the base weights",
    "use_mica": "MiCA is not supported",
}
_PLAIN_INITS: Final = (True, False, None, "gaussian", "eva", "orthogonal")
# Configurations of initialisations; they are named in `init_lora_weights` where used.
_INIT_CONFIGS: Final = frozenset({"corda_config", "loftq_config", "lora_ga_config"})
_MAX_PATTERN: Final = 1000

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Rank and alpha of each target, from `rank` and `alpha` and patterns of target names (regular expressions).

    `target_parameters` are parameters that PEFT adapts directly; `peft_version` is (major, minor, patch), if recorded.
    """

    rank: int
    alpha: float
    rank_patterns: Mapping[str, int]
    alpha_patterns: Mapping[str, float]
    rslora: bool
    target_parameters: tuple[str, ...]
    base_model: str | None
    peft_version: tuple[int, int, int] | None

    def rank_of(self, target: str) -> int:
        """The rank of the update of `target`, such as "model.layers.0.self_attn.q_proj"."""
        return _matching(self.rank_patterns, target, self.rank)

    def scale_of(self, target: str) -> float:
        """What the product of the factors of `target` is multiplied by."""
        rank, alpha = self.rank_of(target), _matching(self.alpha_patterns, target, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def targets(self, parameter: str) -> bool:
        """Whether `target_parameters` name the parameter "model.layers.0.mlp.experts.down_proj"."""
        return any(parameter == t or parameter.endswith("." + t) for t in self.target_parameters)


def _matching(patterns: Mapping[str, Value], target: str, default: Value) -> Value:
    """As PEFT: the first pattern that matches the end of `target`, at a dot."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", target):
            return value
    return default


def parse_config(config: Mapping[str, object], where: str) -> LoraConfig:
    """The configuration in adapter_config.json, called `where` in messages.

    Raises InvalidInputError for anything but a plain LoRA adapter, naming the key, and for malformed values.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InvalidInputError(
            f"{where}: peft_type is {describe_value(kind)}; only LORA adapters can be merged"
        )
    for key, value in config.items():
        if not value or key in _NEUTRAL or key in _READ or key in _INIT_CONFIGS:
            continue
        why = _VARIANTS.get(key, "this key is not known here, and may change what merging means")
        raise InvalidInputError(
            f"{where}: {printable(key)} is {describe_value(value)}: {why}; merge it with PEFT's merge_and_unload"
        )
    init = config.get("init_lora_weights")
    if init not in _PLAIN_INITS and not str(init).startswith("pissa_converted"):
        raise InvalidInputError(
            f"{where}: init_lora_weights is {describe_value(init)}, which also changes the base weights; save the "
            "adapter with path_initial_model_for_weight_conversion, which makes it a plain LoRA adapter"
        )
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise InvalidInputError(
            f"{where}: target_parameters is {describe_value(targets)}, not a list of names"
        )
    base = config.get("base_model_name_or_path")
    return LoraConfig(
        _positive(config.get("r", 8), "r", where),
        _number(config.get("lora_alpha", 8), "lora_alpha", where),
        {k: _positive(v, "rank_pattern", where) for k, v in _patterns(config, "rank_pattern", where).items()},
        {k: _number(v, "alpha_pattern", where) for k, v in _patterns(config, "alpha_pattern", where).items()},
        config.get("use_rslora") is True,
        tuple(targets),
        base if isinstance(base, str) and base else None,
        _version(config.get("peft_version")),
    )


def _patterns(config: Mapping[str, object], key: str, where: str) -> Mapping[str, object]:
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise InvalidInputError(f"{where}: {key} is {describe_value(patterns)}, not an object")
    for pattern in patterns:
        try:
            if len(pattern) > _MAX_PATTERN:
                raise re.error("too long")
            re.compile(pattern)
        except re.error as error:
            raise InvalidInputError(
                f"{where}: {key}: {printable(pattern)} is not a regular expression: {error}"
            ) from None
    return patterns


def _positive(value: object, key: str, where: str) -> int:
    if type(value) is not int or value < 1:
        raise InvalidInputError(f"{where}: {key} is {describe_value(value)}, not a rank of at least 1")
    return value


def _number(value: object, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidInputError(f"{where}: {key} is {describe_value(value)}, not a number")
    return value


def _version(value: object) -> tuple[int, int, int] | None:
    match = re.match(r"(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?", value) if isinstance(value, str) else None
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None
