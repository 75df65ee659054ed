"""One MoE layer of a transformers model, whose experts are read and decoded one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moe_surgery.families.base import Family
from moe_surgery.quality.hidden_states import IN_MEMORY_BYTES, HiddenStates, rows_buffer
from moe_surgery.quality.layers import MoeLayer, Output
from moe_surgery.quality.routing import Routing, recognised
from moe_surgery.quality.transformers_layers.skeleton import Skeleton, expert_parameters

if TYPE_CHECKING:
    from moe_surgery.quality.transformers_layers.model import TransformersModel

__all__ = ["Chosen", "TransformersMoeLayer"]


class Chosen(Exception):
    """The experts are chosen, which ends the first pass."""


class TransformersMoeLayer(MoeLayer):
    """Layer `number` of `model`, its row `row` of a plan, as the layer of `skeleton`, with the experts `kept`."""

    def __init__(
        self,
        model: TransformersModel,
        number: int,
        row: int,
        states: HiddenStates,
        skeleton: Skeleton,
        kept: Sequence[int] | None = None,
    ) -> None:
        self._model, self._number, self.row, self._states = model, number, row, states
        self._skeleton, self._kept = skeleton, kept
        self.experts = model.experts if kept is None else len(kept)
        self.top_k = skeleton.top_k
        self.tail = model.weights.tail_of(number)
        self._x: Tensor | None = None
        self._ids: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._module: Any = None
        few = states.tokens * model.hidden_size * 4 <= IN_MEMORY_BYTES
        self._results: list[list[Any] | None] = [[] if few else None for _ in states.lengths]

    @property
    def states(self) -> HiddenStates:
        return self._states

    @property
    def hidden(self) -> int:
        return self._input().shape[1]

    @property
    def ids(self) -> Tensor:
        self._input()
        return self._ids[0]

    @property
    def weights(self) -> Tensor:
        self._input()
        return self._weights[0]

    @property
    def weighted_input(self) -> bool:  # type: ignore[override]
        self._input()
        return _weights_input(self._module)

    @torch.inference_mode()
    def restricted(self, kept: Sequence[int], top_k: int | None = None) -> MoeLayer:
        source = tuple(kept) if self._kept is None else tuple(self._kept[e] for e in kept)
        skeleton = self._model.skeleton(len(source), min(top_k or self.top_k, len(source)))
        return TransformersMoeLayer(self._model, self._number, self.row, self._states, skeleton, source)

    @torch.inference_mode()
    def expert(self, number: int) -> Output:
        x, module, weights = self._input(), self._module, self.weights
        device, dtype = self._model.device, self._model.dtype
        if number >= self.experts:  # LongCat's experts that return their input
            return lambda tokens, slots: x[tokens.to(x.device)].to(device)
        source = number if self._kept is None else self._kept[number]
        parameters = self._model.weights.expert_of(self._model.weights.layer(self._number), source)
        where = f"{self._skeleton.prefix}{self._number}.mlp.experts.{source}."
        needed = expert_parameters(self._skeleton.layers[self._number])
        self._model.weights.check_complete([where + name for name in needed if name not in parameters])
        scaled = _weights_input(module)

        def output(tokens: Tensor, slots: Tensor) -> Tensor:
            given = x[tokens.to(x.device)].to(device, dtype)
            if scaled:
                given = given * weights[tokens, slots, None].to(dtype)
            return _expert(module, parameters, given)

        return output

    @torch.inference_mode()
    def finish(self, mixture: Tensor) -> None:
        device, dtype = self._model.device, self._model.dtype

        def mixed(rows: slice, _: nn.Module, x: Tensor, *__: Tensor) -> Tensor:
            return mixture[rows].to(device, dtype).view_as(x)

        self._model.walk(self._skeleton, self._number, self._states, mixed, self._results)

    @torch.inference_mode()
    def routing(self) -> Routing:
        model, x = self._model, self._input().float().cpu()
        router, bias = model.weights.router_weight(self._number)
        # A described family's bias is part of the logits, others have one for the choice alone.
        added = isinstance(model.spec.family, Family)
        logits = linear(x, router.float().cpu(), bias.float().cpu() if added and bias is not None else None)
        return recognised(
            logits,
            None if bias is None or added else bias.float().cpu().flatten(),
            model.spec.grouping,
            self.ids.cpu(),
            self.weights.cpu(),
            1e-4 if model.dtype == torch.float32 else 0.05,
            f"{model.where}: layer {self._number}",
        )

    def _input(self) -> Tensor:
        """The experts' input [tokens, hidden], from the first pass through the layer, which also gives the choice."""
        if self._x is None:
            self._first_pass()
            assert self._x is not None
        return self._x

    @torch.inference_mode()
    def _first_pass(self) -> None:
        model = self._model
        model.set_layer(self._skeleton, self._number, self._kept)
        x = rows_buffer(self._states.tokens, model.hidden_size, model.dtype, model.device)

        def chosen(rows: slice, module: nn.Module, given: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            x[rows] = given.reshape(-1, given.shape[-1]).to(x.device)
            self._ids.append(ids.reshape(len(x[rows]), -1))
            self._weights.append(weights.reshape(len(x[rows]), -1))
            self._module = module
            raise Chosen

        model.walk(self._skeleton, self._number, self._states, chosen, self._results)
        self._ids, self._weights = [torch.cat(self._ids)], [torch.cat(self._weights)]
        self._x = x


def _weights_input(module: Any) -> bool:
    return type(module).__name__ == "Llama4TextExperts"


def _expert(module: Any, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """The expert with `parameters` of the experts module `module`, for x [n, hidden]."""
    transposed = getattr(module, "is_transposed", _weights_input(module))

    def product(x: Tensor, name: str) -> Tensor:
        weight, bias = parameters[name], parameters.get(f"{name}_bias")
        return linear(x, weight.T if transposed else weight, bias)

    if not getattr(module, "has_gate", True):
        inner = module.act_fn(product(x, "up_proj"))
    elif hasattr(module, "_apply_gate"):
        inner = module._apply_gate(product(x, "gate_up_proj"))
    else:
        gate, up = product(x, "gate_up_proj").chunk(2, dim=-1)
        inner = module.act_fn(gate) * up
    output = product(inner, "down_proj")
    return module.post_expert_norm(output) if getattr(module, "has_post_expert_norm", False) else output
