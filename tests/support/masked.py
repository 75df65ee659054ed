"""The oracle for every family: transformers' own model, in which routers cannot choose dropped experts.

Router logits of dropped experts become minus infinity where the router's weight is multiplied, and so do their
selection biases; nothing else is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
_LAYER = ".layers."


def auto_class(config: Any) -> Any:
    """The auto class for the language model of `config`, with its other parts if it has some."""
    nested = config.get_text_config() is not config
    causal = AutoModelForCausalLM._model_mapping
    return AutoModelForImageTextToText if nested or type(config) not in causal else AutoModelForCausalLM


def load(folder: Path, *, top_k: int | None = None) -> torch.nn.Module:
    """The model in `folder` in float32; nothing may be missing from the files, or left over."""
    config = AutoConfig.from_pretrained(folder)
    text = config.get_text_config()
    for key in TOP_K if top_k is not None else ():
        if getattr(text, key, None) is not None:
            setattr(text, key, top_k)
    model, info = auto_class(config).from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "conversion_errors"):
        assert not info.get(what), (what, info[what])
    return model.eval()


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return result


def _of_layers(model: torch.nn.Module) -> Iterator[tuple[int, str, torch.Tensor]]:
    """(layer, name in it, tensor) of every parameter and buffer of a decoder layer."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        before, found, rest = name.partition(_LAYER)
        if found and "vis" not in before:
            number, _, inner = rest.partition(".")
            yield int(number), inner, value


def router_weights(model: torch.nn.Module, rows: int) -> dict[int, torch.Tensor]:
    """The router's weight of each MoE layer: a matrix of `rows` rows called gate, router or classifier."""
    found = {}
    for layer, name, value in _of_layers(model):
        called = ("gate", "router", "wg", "classifier")
        matrix = name.endswith("weight") and value.ndim == 2 and value.shape[0] == rows
        if matrix and any(part in called for part in name.split(".")):
            assert layer not in found, name
            found[layer] = value
    return found


def biases(model: torch.nn.Module, rows: tuple[int, ...]) -> Iterator[tuple[int, torch.Tensor]]:
    """The selection biases of MoE layers, whatever they are called."""
    for layer, name, value in _of_layers(model):
        last = name.rpartition(".")[2]
        if last in ("e_score_correction_bias", "expert_bias", "router_bias"):
            assert value.shape[-1] in rows, name
            yield layer, value


@contextmanager
def restricted(
    model: torch.nn.Module, kept: Mapping[int, Sequence[int]], experts: int, tail: int = 0
) -> Iterator[None]:
    """`model` with only the experts `kept[layer]` of each MoE layer."""
    masks: dict[int, torch.Tensor] = {}
    weights = router_weights(model, experts + tail)
    assert sorted(weights) == sorted(kept)
    for layer, weight in weights.items():
        mask = torch.zeros(experts + tail)
        mask[[e for e in range(experts) if e not in kept[layer]]] = -torch.inf
        masks[weight.data_ptr()] = mask
    for layer, bias in biases(model, (experts, experts + tail)):
        dropped = [e for e in range(experts) if e not in kept[layer]]
        with torch.no_grad():
            bias[..., dropped] = -torch.inf
    linear, used = torch.nn.functional.linear, set()

    def masked(input: Any, weight: Any, bias: Any = None) -> Any:
        result = linear(input, weight, bias)
        mask = masks.get(weight.data_ptr())
        if mask is None:
            return result
        used.add(weight.data_ptr())
        return result + mask.to(result.dtype)

    with mock.patch.object(torch.nn.functional, "linear", masked):
        yield
    assert used == set(masks), "a router does not call linear"


def tables(model: torch.nn.Module) -> dict[int, torch.Tensor]:
    """The tables of expert numbers by token (DeepSeek-V4), by layer."""
    return {layer: value for layer, name, value in _of_layers(model) if name.endswith("tid2eid")}
