"""Models of families that the runtime runs, over its own kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_surgery.kernels.interface import MeasuredExperts
from moe_surgery.kernels.weights import Layer
from moe_surgery.quality.hidden_states import HiddenStates, rows_buffer
from moe_surgery.quality.layers import LayerModel, MoeLayer, Output
from moe_surgery.quality.layerwise import (
    apply_attention,
    apply_experts,
    backend_of,
    choose_experts,
    embed,
    logits_of,
)
from moe_surgery.quality.routing import Routing
from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.view import view_layer

__all__ = ["OwnLayers", "as_layers"]


class OwnLayers(LayerModel):
    """The layers of `model`; those of a model loaded with `one_layer` are read one at a time."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.depth = self.moe_layers = len(model.layers)
        self.experts = model.config.num_local_experts
        self.hidden_size, self.vocab_size = model.config.hidden_size, model.config.vocab_size
        self.device, self.dtype, self.computation = model.device, model.dtype, model.computation

    def embed(self, passages: Sequence[Sequence[int]]) -> HiddenStates:
        return embed(self.model, passages)

    def enter(self, number: int, states: HiddenStates) -> MoeLayer | None:
        layer = self.model.layers[number]
        apply_attention(self.model, number, layer, states)
        return OwnMoeLayer(self.model, number, layer, states)

    def logits(self, x: Tensor) -> Tensor:
        return logits_of(self.model, x)


class OwnMoeLayer(MoeLayer):
    """Layer `number` of `model`, or a view of it; the attention's output is already in `states`."""

    def __init__(self, model: CausalLM, number: int, layer: Layer, states: HiddenStates) -> None:
        self._model, self._layer, self._states = model, layer, states
        self.row, self.experts, self.top_k = number, layer.router.weight.shape[0], layer.top_k
        self._routes: tuple[Tensor, Tensor] | None = None

    @property
    def states(self) -> HiddenStates:
        return self._states

    @property
    def hidden(self) -> int:
        return self._model.config.hidden_size

    @property
    def ids(self) -> Tensor:
        return self._routed()[0]

    @property
    def weights(self) -> Tensor:
        return self._routed()[1]

    def restricted(self, kept: Sequence[int], top_k: int | None = None) -> MoeLayer:
        return OwnMoeLayer(self._model, self.row, view_layer(self._layer, tuple(kept), top_k), self._states)

    def expert(self, number: int) -> Output:
        return lambda tokens, slots: self._output(tokens, number)

    @torch.inference_mode()
    def mixture(self) -> Tensor:
        y = rows_buffer(self._states.tokens, self.hidden, torch.float32, self._states.device)
        for where in self._states.pieces():
            x, ids, weights = choose_experts(self._model, self._layer, self._states, where)
            y[where] = (
                backend_of(self._model).experts(x, ids, weights, self._layer.experts).float().to(y.device)
            )
        return y

    @torch.inference_mode()
    def measured(self, owner: Tensor, sums: Tensor) -> MeasuredExperts:
        backend, states, ids = backend_of(self._model), self._states, self.ids
        y = rows_buffer(states.tokens, self.hidden, torch.float32, states.device)
        norms = torch.empty(ids.shape, dtype=torch.float64)
        least, largest = torch.empty(ids.shape), torch.empty(ids.shape)
        for where in states.pieces():
            x = self._normed(states[where])
            piece = backend.measured_experts(
                x, ids[where], self.weights[where], self._layer.experts, owner[where], sums
            )
            if piece is None:  # the backend has no such pass
                return super().measured(owner, sums)
            y[where] = piece.y.float().to(y.device)
            norms[where], least[where], largest[where] = piece.norms, piece.least, piece.largest
        return MeasuredExperts(y, norms, least, largest)

    @torch.inference_mode()
    def finish(self, mixture: Tensor) -> None:
        states = self._states
        for where in states.pieces():
            states.add(where, mixture[where])

    def apply(self) -> Tensor:
        return apply_experts(self._model, self._layer, self._states)[0]

    @torch.inference_mode()
    def routing(self) -> Routing:
        router, backend = self._layer.router, backend_of(self._model)
        assert router.bias is not None
        shares = torch.empty(self._states.tokens, self.experts)
        for where in self._states.pieces():
            x = self._normed(self._states[where])
            ids, weights = backend.route(x.float(), router.weight, router.bias, self.experts)
            shares[where] = torch.zeros(len(x), self.experts).scatter_(1, ids.cpu(), weights.float().cpu())
        return Routing(shares, self.top_k)

    def _routed(self) -> tuple[Tensor, Tensor]:
        if self._routes is None:
            pieces = [
                choose_experts(self._model, self._layer, self._states, w)[1:] for w in self._states.pieces()
            ]
            ids, weights = (torch.cat(parts) for parts in zip(*pieces, strict=True))
            self._routes = ids, weights
        return self._routes

    def _normed(self, x: Tensor) -> Tensor:
        return backend_of(self._model).rms_norm(x, self._layer.mlp_norm, self._model.config.rms_norm_eps)

    @torch.inference_mode()
    def _output(self, tokens: Tensor, expert: int) -> Tensor:
        """The output of one expert for some tokens, before its routing weight, [tokens, hidden]."""
        x = self._normed(self._states[tokens])
        ids = torch.full((len(tokens), 1), expert, dtype=torch.int64, device=x.device)
        return backend_of(self._model).experts(
            x, ids, torch.ones_like(ids, dtype=x.dtype), self._layer.experts
        )


def as_layers(model: LayerModel | CausalLM) -> LayerModel:
    return OwnLayers(model) if isinstance(model, CausalLM) else model
