"""The small tensors that a repair changes: routers, the experts' biases of the down projection, and norms."""

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

    `router` weights [kept, hidden] and biases [kept], `down_bias` [kept, hidden]; with `norms` the weights of all
    RMSNorms. Computing uses their values rounded to the stored dtype; gradients pass the rounding unchanged.
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
        kept = layer.experts.expert_map
        down_bias = layer.experts.down_bias if kept is None else layer.experts.down_bias[kept]
        yield names.router.weight.format(layer=number), layer.router.weight
        yield names.router.bias.format(layer=number), layer.router.bias
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
        """`layer` of the view with these tensors in place of its own."""
        names = self._names.layer

        def used(name: str) -> Tensor:
            return self.used(name.format(layer=number))

        e, down_bias = layer.experts, used(names.down_bias)
        if e.expert_map is not None:  # biases are indexed as the stored experts are
            stored = torch.zeros_like(e.down_bias, dtype=torch.float32)
            down_bias = stored.index_copy(0, e.expert_map, down_bias)
        repaired = replace(
            layer,
            router=Projection(used(names.router.weight), used(names.router.bias)),
            experts=replace(e, down_bias=down_bias),
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
