"""What transformers makes of a checkpoint folder: the independent word on what a pruned model computes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, Mxfp4Config, PreTrainedModel

from tests.support.checkpoints import load_config

transformers.logging.disable_progress_bar()

Kept = tuple[tuple[int, ...], ...]


def load_model(
    folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32, **config: object
) -> PreTrainedModel:
    """The model in `folder`, MXFP4 dequantised; every key of the model found, and no other.

    `config` replaces values of config.json.
    """
    options = dict(config)
    if "quantization_config" in load_config(folder):
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    model, report = AutoModelForCausalLM.from_pretrained(
        Path(folder),
        dtype=dtype,
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    assert not any(report.values()), report
    return model.eval()


def logits_of(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


class FullModel:
    """A whole model that can be told to route to some of its experts only."""

    def __init__(self, folder: str | os.PathLike[str], tokens: torch.Tensor) -> None:
        self._model = load_model(folder)
        self._tokens = tokens
        self._known: dict[Kept, torch.Tensor] = {}

    def logits(self, kept: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits with the router's bias of every expert outside `kept[layer]` at minus infinity."""
        key = tuple(map(tuple, kept))
        if key not in self._known:
            self._known[key] = self._masked(key)
        return self._known[key]

    def _masked(self, kept: Kept) -> torch.Tensor:
        routers = [layer.mlp.router for layer in self._model.model.layers]
        before = [(router, router.bias.detach().clone(), router.top_k) for router in routers]
        try:
            for router, experts in zip(routers, kept, strict=True):
                dropped = torch.ones(router.num_experts, dtype=torch.bool)
                dropped[list(experts)] = False
                router.bias.data[dropped] = -torch.inf
                router.top_k = min(router.top_k, len(experts))
            return logits_of(self._model, self._tokens)
        finally:
            for router, bias, top_k in before:
                router.bias.data.copy_(bias)
                router.top_k = top_k
