"""A transformers model without its weights: how its layers are called, and where their experts are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_surgery.errors import InvalidInputError
from moe_surgery.quality.transformers_layers.parameters import Parameters

__all__ = ["Call", "Experts", "Skeleton", "expert_parameters"]

NOT_BY_LAYERS = ("glm_moe_dsa",)
Experts = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""What replaces the forward of an experts module: (module, hidden states [tokens, hidden], ids and routing weights
[tokens, top_k]) -> [tokens, hidden]."""


class _Reached(Exception):
    """The forward pass has come to the wanted layer; carries its arguments."""


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of a decoder layer but for the hidden states, and their shape."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    states: Tensor


class Skeleton:
    """The model of `config` (config.json) with parameters on the meta device, computing in `dtype` on `device`.

    `top_k` is its experts per token. Its layers do nothing when the model runs: that is how their arguments (masks,
    positions) are found, and how the parts before the first and after the last one are run alone. `run` runs one.
    `experts` runs in place of every experts module.

    Raises InvalidInputError, naming `where`, for a model that transformers does not have or cannot build.
    """

    def __init__(
        self,
        config: Mapping[str, object],
        top_k: int,
        dtype: torch.dtype,
        device: torch.device,
        experts: Experts,
        where: str,
    ) -> None:
        self.model = _build(config, dtype, where).eval()
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)
        self.top_k, self.device, self.dtype = top_k, device, dtype
        self.decoder: Any = _decoder(self.model, where)
        self.layers: nn.ModuleList = self.decoder.layers
        names = {id(module): name for name, module in self.model.named_modules()}
        self.prefix = names[id(self.layers)] + "."
        self.decoder_prefix = names[id(self.decoder)] + "."
        self.parameters = Parameters(self.model)
        self.embedding = self.model.get_input_embeddings()
        self.embedding.padding_idx = None
        empty = torch.empty((0, self.hidden_size), dtype=dtype, device=device)
        self.embedding._parameters["weight"] = nn.Parameter(empty, requires_grad=False)
        self.embedding.forward = self._embed
        self._table: Tensor | None = None
        self._wanted: int | None = None
        self._final: Tensor | None = None
        self._results: list[Any] | None = None
        self._replayed = 0
        for number, layer in enumerate(self.layers):
            layer.forward = partial(self._pass, number)
            found = experts_of(layer)
            if found is None:
                continue
            for module in _parts(layer, found):
                module.forward = partial(self._remember, module)
            moe = layer.get_submodule(found.rpartition(".")[0])
            if type(moe).__name__ == "Llama4TextMoe":  # hands its experts all tokens for all experts
                moe.forward = partial(_llama4_moe, moe, experts)
            else:
                layer.get_submodule(found).forward = partial(experts, layer.get_submodule(found))

    @torch.inference_mode()
    def call(self, number: int, tokens: Tensor, table: Tensor | None = None) -> Call:
        """How layer `number` is called for `tokens`, int64 [n].

        Hidden states are those of the embedding `table` [vocabulary, hidden], which may be of any dtype and device;
        without one they are zeros.
        """
        self._wanted, self._table = number, table
        try:
            self.model(input_ids=tokens[None].to(self.device), use_cache=False)
        except _Reached as reached:
            args, kwargs = reached.args
            kwargs = dict(kwargs)
            states = args[0] if args else kwargs.pop("hidden_states")
            return Call(args[1:], kwargs, states)
        finally:
            self._wanted = self._table = None
        raise AssertionError(f"layer {number} was not called")

    def run(self, number: int, call: Call, states: Tensor, results: list[Any] | None = None) -> Tensor:
        """Hidden states after layer `number`, of the shape that `call` says.

        `results` is filled with what its attention and other parts give. Of a filled one, from an earlier run with
        the same states, they are taken instead of being computed.
        """
        layer = self.layers[number]
        self._results, self._replayed = results, 0
        try:
            result = type(layer).forward(layer, states, *call.args, **call.kwargs)
        finally:
            self._results = None
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    def forget(self, number: int) -> None:
        """Let go of the parameters of layer `number`."""
        for module in self.layers[number].modules():
            for name, value in module._parameters.items():
                if value is not None and not value.is_meta:
                    module._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """Logits [rows, vocabulary] of `states` after the last layer, [1, rows, ...]."""
        self._final = states
        try:
            tokens = torch.zeros((1, states.shape[1]), dtype=torch.int64, device=self.device)
            result: Tensor = self.model(input_ids=tokens, use_cache=False).logits[0]
            return result.float()
        finally:
            self._final = None

    def _pass(self, number: int, *args: Any, **kwargs: Any) -> Tensor:
        if number == self._wanted:
            raise _Reached(args, kwargs)
        if self._final is not None and number == len(self.layers) - 1:
            return self._final
        states: Tensor = args[0] if args else kwargs["hidden_states"]
        return states

    def _remember(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        results = self._results
        if results is None:
            return type(module).forward(module, *args, **kwargs)
        if self._replayed == len(results):
            results.append(type(module).forward(module, *args, **kwargs))
        self._replayed += 1
        return results[self._replayed - 1]

    def _embed(self, ids: Tensor) -> Tensor:
        """The embedding of `ids`, from as many rows of the table as they need."""
        if self._table is None:
            return torch.zeros((), dtype=self.dtype, device=self.device).expand(*ids.shape, self.hidden_size)
        rows, ids = torch.unique(ids, return_inverse=True)
        rows = self._table[rows.to(self._table.device)].to(self.device, self.dtype)
        self.embedding._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
        result: Tensor = type(self.embedding).forward(self.embedding, ids)
        return result

    @property
    def hidden_size(self) -> int:
        size: int = self.model.config.get_text_config().hidden_size
        return size


def _decoder(model: Any, where: str) -> Any:
    """The module of `model` that has the decoder layers."""
    decoder = model.get_decoder()
    while not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        decoder = getattr(decoder, "model", None)
        if decoder is None:
            raise InvalidInputError(
                f"{where}: {type(model).__name__} of transformers has no list of decoder layers"
            )
    return decoder


def expert_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The stacked parameters of a layer's experts, by their names in the module that holds them."""
    name = experts_of(layer)
    if name is None:
        return {}
    module = layer.get_submodule(name)
    return {leaf: p for leaf, p in module._parameters.items() if p is not None and "_proj" in leaf}


def _parts(layer: nn.Module, experts: str) -> list[nn.Module]:
    """The modules in `layer` that take time (attention, dense MLPs), without the one with the experts."""
    parts: list[nn.Module] = []
    for name, module in layer.named_children():
        if experts == name or experts.startswith(name + "."):
            continue
        listed = list(module.children()) if isinstance(module, nn.ModuleList) else [module]
        parts += [each for each in listed if next(each.children(), None) is not None]
    return parts


def experts_of(layer: nn.Module) -> str | None:
    """The name in `layer` of the module that holds stacked experts, None where there is none."""
    for name, module in layer.named_modules():
        down = module._parameters.get("down_proj")
        if down is not None and down.ndim == 3 and "shared" not in name:
            return str(name)
    return None


def _llama4_moe(moe: Any, experts: Experts, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    hidden_states = hidden_states.reshape(-1, moe.hidden_dim)
    scores, logits = moe.router(hidden_states)
    weights, ids = scores.topk(moe.top_k, dim=1)
    return moe.shared_expert(hidden_states) + experts(moe.experts, hidden_states, ids, weights), logits


def _build(config: Mapping[str, object], dtype: torch.dtype, where: str) -> Any:
    model_type: Any = config.get("model_type")
    if model_type in NOT_BY_LAYERS:
        raise InvalidInputError(
            f"{where}: {model_type} cannot be run layer by layer: its layers hand more than hidden states to the next"
        )
    if model_type not in CONFIG_MAPPING:
        raise InvalidInputError(
            f"{where}: transformers {transformers.__version__} has no model of type {model_type}; a later version may"
        )
    try:
        parsed: Any = CONFIG_MAPPING[model_type].from_dict(_plain(config))
        architecture = next(iter(parsed.architectures or ()), "")
        cls: Any = getattr(transformers, architecture, None)
        if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel) and cls.can_generate()):
            causal = type(parsed) in AutoModelForCausalLM._model_mapping
            auto = AutoModelForCausalLM if causal else AutoModelForImageTextToText
            cls = auto._model_mapping[type(parsed)]
        with init_empty_weights(include_buffers=False):
            return cls._from_config(parsed, dtype=dtype)
    except (KeyError, TypeError, ValueError, AttributeError, ImportError, RuntimeError) as error:
        raise InvalidInputError(
            f"{where}: transformers {transformers.__version__} cannot build this model: {str(error)[:200]}"
        ) from None


def _plain(value: Any) -> Any:
    """config.json as transformers reads it, but without how weights are stored: they come decoded."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"}:  # how transformers writes an infinity
            return float(value["__float__"])
        return {key: _plain(inner) for key, inner in value.items() if key != "quantization_config"}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value
