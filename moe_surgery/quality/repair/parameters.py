"""The small tensors that a repair changes: routers, biases of the experts, and norms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_surgery.families.base import LayerNames, WeightNames
from moe_surgery.kernels.weights import Layer, Projection
from moe_surgery.runtime.model import CausalLM

__all__ = ["SmallTensors"]


class SmallTensors:
    """The tensors that are repaired, by their names in the pruned checkpoint, in float32.

    `router` weights [kept, hidden] and biases [kept], `gate_up_bias` [kept, 2 * intermediate], `down_bias` [kept,
    hidden]; with `norms` the weights of all RMSNorms. Computing uses their values rounded to the stored dtype;
    gradients pass the rounding unchanged.
    """

    def __init__(self, model: CausalLM, names: WeightNames, *, norms: bool) -> None:
        """Those of `model`, a view of the full model with only the kept experts."""
        self._names, self._norms = names, norms
        self.values: dict[str, Tensor] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for number in range(len(model.layers)):
            for name, tensor in self._of_layer(number, model.layers[number]):
                self._add(name, tensor)
        if norms:
            self._add(names.norm, model.norm)

    def _add(self, name: str, tensor: Tensor) -> None:
        self.values[name] = tensor.detach().float().clone()
        self.dtypes[name] = tensor.dtype

    def _of_layer(self, number: int, layer: Layer) -> Iterator[tuple[str, Tensor]]:
        names = self._names.layer
        assert layer.router.bias is not None
        e, kept = layer.experts, layer.experts.expert_map
        gate_up_bias, down_bias = (b if kept is None else b[kept] for b in (e.gate_up_bias, e.down_bias))
        yield names.router.weight.format(layer=number), layer.router.weight
        yield names.router.bias.format(layer=number), layer.router.bias
        yield names.gate_up_bias.format(layer=number), gate_up_bias
        yield names.down_bias.format(layer=number), down_bias
        if self._norms:
            yield names.attention_norm.format(layer=number), layer.attention_norm
            yield names.mlp_norm.format(layer=number), layer.mlp_norm

    @property
    def layer_names(self) -> LayerNames:
        return self._names.layer

    def require_grad(self) -> list[Tensor]:
        """Make all of them leaves that collect gradients."""
        return [value.requires_grad_() for value in self.values.values()]

    def copy_from(self, values: Mapping[str, Tensor]) -> None:
        """Set the values in place."""
        with torch.no_grad():
            for name, value in values.items():
                self.values[name].copy_(value)

    def clones(self) -> dict[str, Tensor]:
        """A copy of the values, on the CPU."""
        return {name: value.detach().to("cpu", copy=True) for name, value in self.values.items()}

    def stored(self) -> dict[str, Tensor]:
        """The values in the dtype of the checkpoint, on the CPU."""
        return {name: v.detach().to(self.dtypes[name]).cpu().contiguous() for name, v in self.values.items()}

    def used(self, name: str) -> Tensor:
        """The value that is computed with."""
        result: Tensor = _Rounded.apply(self.values[name], self.dtypes[name])  # type: ignore[no-untyped-call]
        return result

    def layer(self, number: int, layer: Layer) -> Layer:
        """`layer` of the view with its tensors replaced by these."""
        names = self._names.layer

        def used(name: str) -> Tensor:
            return self.used(name.format(layer=number))

        def stored(value: Tensor, like: Tensor) -> Tensor:
            """The biases, indexed as the stored experts are."""
            if e.expert_map is None:
                return value
            return torch.zeros_like(like, dtype=torch.float32).index_copy(0, e.expert_map, value)

        e = layer.experts
        gate_up_bias = stored(used(names.gate_up_bias), e.gate_up_bias)
        down_bias = stored(used(names.down_bias), e.down_bias)
        repaired = replace(
            layer,
            router=Projection(used(names.router.weight), used(names.router.bias)),
            experts=replace(e, gate_up_bias=gate_up_bias, down_bias=down_bias),
        )
        if not self._norms:
            return repaired
        return replace(repaired, attention_norm=used(names.attention_norm), mlp_norm=used(names.mlp_norm))

    def norm(self, model: CausalLM) -> Tensor:
        """The weight of the last RMSNorm."""
        return self.used(self._names.norm) if self._norms else model.norm


class _Rounded(torch.autograd.Function):
    """To a dtype and back to float32."""

    @staticmethod
    def forward(_: Any, value: Tensor, dtype: torch.dtype) -> Tensor:
        return value.to(dtype).float()

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
