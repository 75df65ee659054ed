"""Recognises checkpoints that no family matches, for the error message."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.text import describe_value, printable
from moe_surgery.families.base import AnyFamily, Family

__all__ = ["supported_types", "unsupported_reason"]

UNQUANTISED: Final = "use the checkpoint it was made from, or save it dequantised"

# Names of tensors that only a quantised checkpoint has.
_QUANTISED: Final = (
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "AWQ or GPTQ"),
    (re.compile(r"\.(weight_packed|weight_global_scale|input_global_scale)$"), "compressed-tensors"),
    (re.compile(r"\.(absmax|quant_map|quant_state\.[\w.]+)$"), "bitsandbytes"),
    (re.compile(r"\.weight_scale_2$"), "NVFP4"),
    (re.compile(r"_scale_inv$|\.weight_scale$"), "FP8"),
)
# Layouts of experts, by tensor name, within a family that stacks them.
_LAYOUTS: Final = (
    (re.compile(r"\.experts\.[0-9]+\."), "stores every expert in separate tensors"),
    (re.compile(r"\.experts\.[a-z_]+s\.[0-9]+\."), "stores every expert in separate tensors"),
    (re.compile(r"\.experts\.(gate|up)_proj(_|\.|$)"), "stores gate and up projections separately"),
)
_STACKED: Final = re.compile(r"\.experts\.gate_up_proj(_blocks)?$")
_WRAPPERS: Final = (
    "module.",
    "_orig_mod.",
    "base_model.model.",
    "pretrained_model.",
    "_fsdp_wrapped_module.",
)
# Tensor names that identify another family where config.json does not.
_FAMILIES: Final = (
    (re.compile(r"\.block_sparse_moe\.experts\.[0-9]+\.w[123]\."), "a Mixtral-like"),
    (re.compile(r"\.mlp\.experts\.[0-9]+\.(gate|up|down)_proj\."), "a Qwen-MoE-like or DeepSeek-like"),
    (re.compile(r"\.feed_forward\.experts\."), "a Llama-4-like"),
    (re.compile(r"\.ffn\.experts\.[0-9]+\."), "a DeepSeek-V4-like"),
    (re.compile(r"\.mixer\.experts\.[0-9]+\."), "a Nemotron-like"),
)


def supported_types(families: tuple[AnyFamily, ...]) -> str:
    """The model types of `families` for a message; those of the catalogue only counted."""
    described = [f.model_type for f in families if isinstance(f, Family)]
    others = len({f.model_type for f in families} - set(described))
    return ", ".join(described) + (f" and {others} others (docs/families.md)" if others else "")


def unsupported_reason(checkpoint: Checkpoint, families: tuple[AnyFamily, ...]) -> str | None:
    """One line that says what `checkpoint` is and what to do; None where it is not recognised."""
    config, names = checkpoint.config, checkpoint.tensors
    model_type = config.get("model_type")
    family = next((f for f in families if isinstance(f, Family) and f.model_type == model_type), None)
    classes = _architectures(config)
    if family is None and (model_type is not None or classes):
        return _another_family(checkpoint, model_type, classes, families)
    if family is None:
        match = _first(names, _FAMILIES)
        return match and (
            f"{checkpoint.where(match[0])}: belongs to {match[1]} checkpoint; "
            f"supported model_type: {supported_types(families)}"
        )
    return (
        _quantised(checkpoint)
        or _wrapped(checkpoint)
        or _other_class(checkpoint, family, classes)
        or _other_layout(checkpoint, family)
    )


def _another_family(
    checkpoint: Checkpoint, model_type: object, classes: list[str], families: tuple[AnyFamily, ...]
) -> str:
    where, supported = printable_path(checkpoint.config_path), supported_types(families)
    class_name = printable(classes[0]) if classes else ""
    if isinstance(model_type, str) and model_type:
        named = f"is a {printable(model_type)} checkpoint" + (f" ({class_name})" if class_name else "")
    elif model_type is None:
        named = f"is a {class_name} checkpoint"
    else:
        named = f"model_type is {describe_value(model_type)}"
    return f"{where}: {named}; supported model_type: {supported}"


def _architectures(config: Mapping[str, object]) -> list[str]:
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _quantised(checkpoint: Checkpoint) -> str | None:
    quantization = checkpoint.config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    if isinstance(method, str) and method != "mxfp4":
        where = f"{printable_path(checkpoint.config_path)}: quantization_config: quant_method '{printable(method)}'"
    elif match := _first(checkpoint.tensors, _QUANTISED):
        where = f"{checkpoint.where(match[0])}: quantised as {match[1]}"
    else:
        return None
    return f"{where} is not supported (experts may be MXFP4 or unquantised); {UNQUANTISED}"


def _wrapped(checkpoint: Checkpoint) -> str | None:
    for prefix in _WRAPPERS:
        if any(name.startswith(prefix) for name in checkpoint.tensors):
            return (
                f"{printable_path(checkpoint.path)}: tensor names begin with {prefix!r}: it was saved inside "
                "a training wrapper; save the wrapped model"
            )
    return None


def _other_class(checkpoint: Checkpoint, family: Family, classes: list[str]) -> str | None:
    """A model with another head, or without one."""
    names = checkpoint.tensors
    head = next((n for n in ("score.weight", "classifier.weight", "qa_outputs.weight") if n in names), None)
    if head is not None:
        named = printable(classes[0]) if classes and "CausalLM" not in classes[0] else "a classifier"
        labels = names[head].shape[0] if names[head].shape else 0
        return (
            f"{printable_path(checkpoint.path)}: is {named}: it has {head} with {labels} labels instead of "
            f"lm_head.weight; only {family.title} language models (CausalLM) are supported: prune the one it was "
            "trained from"
        )
    if "embed_tokens.weight" in names:
        return (
            f"{printable_path(checkpoint.path)}: is a bare {family.title} model without a language model head; "
            "save it as AutoModelForCausalLM"
        )
    if classes and not any(name.endswith("ForCausalLM") for name in classes):
        return (
            f"{printable_path(checkpoint.config_path)}: architectures is {printable(classes[0])}; only "
            f"{family.title} language models (CausalLM) are supported"
        )
    return None


def _other_layout(checkpoint: Checkpoint, family: Family) -> str | None:
    if any(_STACKED.search(name) for name in checkpoint.tensors):
        return None
    match = _first(checkpoint.tensors, _LAYOUTS)
    return match and (
        f"{checkpoint.where(match[0])}: {match[1]}; {family.title} checkpoints store experts stacked and gate and up "
        "fused (mlp.experts.gate_up_proj): convert it first, with the program that wrote it"
    )


def _first(names: Iterable[str], patterns: tuple[tuple[re.Pattern[str], str], ...]) -> tuple[str, str] | None:
    """The first name in order that a pattern matches, with the pattern's meaning."""
    for pattern, meaning in patterns:
        if name := min((n for n in names if pattern.search(n)), default=None):
            return name, meaning
    return None
