"""The weights of a checkpoint, layer by layer and expert by expert, as a transformers model has them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from moe_surgery.checkpoint.checkpoint import Checkpoint, TensorRef
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.text import printable
from moe_surgery.engine.spans import Span
from moe_surgery.errors import InvalidInputError
from moe_surgery.families.base import Role
from moe_surgery.families.model_spec import EXPERT, ModelSpec, ModelTensor
from moe_surgery.quality.transformers_layers.parameters import Parameters
from moe_surgery.quality.transformers_layers.stored import DenseTensor, dense_tensors
from moe_surgery.runtime.mapped import MappedShards
from moe_surgery.surgery.program import Remap
from moe_surgery.surgery.routing_table import remapped

__all__ = ["AHEAD", "LayerWeights", "Weights"]

# Experts that are read in the background while one computes.
AHEAD = 8


@dataclass(slots=True)
class LayerWeights:
    """The tensors of one decoder layer, or of all that is in none: `whole`, those of its `router`, `experts`.

    `row` is the layer's row of a plan, None without experts.
    """

    whole: list[DenseTensor] = field(default_factory=list)
    router: list[ModelTensor] = field(default_factory=list)
    experts: list[DenseTensor] = field(default_factory=list)
    row: int | None = None


class Weights:
    """The tensors of `checkpoint`, sorted by the layers of a model with `parameters`.

    `layers_prefix` begins the names of parameters in layers. Values are in `dtype` on `device`, except where the
    model has another one. Raises InvalidInputError for a quantisation that is not decoded here, and naming
    the parameter where one has no tensor.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        parameters: Parameters,
        layers_prefix: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._parameters, self._dtype, self._device = parameters, dtype, device
        self._shards = MappedShards(checkpoint)
        self._spec, self._where = spec, printable_path(checkpoint.path)
        self._stored: dict[str, tuple[ModelTensor, TensorRef]] = {}
        refs: dict[str, TensorRef] = {}
        for tensor in spec.tensors:
            if tensor.mtp:
                continue
            template = tensor.name if tensor.pieces else tensor.stored.name
            for name, ref in (
                (template, tensor.stored),
                *([(tensor.scales.name, tensor.scales)] if tensor.scales else ()),
            ):
                self._stored[name], refs[name] = (tensor, ref), ref
        self.outside = LayerWeights()
        self._layers: dict[int, LayerWeights] = {}
        for dense in dense_tensors(refs, spec.config, self._where):
            tensor = self._stored[dense.parts["weight"]][0]
            target = parameters.target(dense.name.replace(EXPERT, "0"))[0]
            if not target.startswith(layers_prefix):
                self.outside.whole.append(dense)
                continue
            layer = self.layer(int(target[len(layers_prefix) :].partition(".")[0]))
            if tensor.role.in_expert:
                layer.row = tensor.layer
                layer.experts.append(dense)
            elif tensor.role in (Role.ROUTER, Role.ROUTING_TABLE) and tensor.layer is not None:
                layer.router.append(tensor)
            else:
                layer.whole.append(dense)

    def layer(self, number: int) -> LayerWeights:
        return self._layers.setdefault(number, LayerWeights())

    def parameters_of(self, tensors: Sequence[DenseTensor]) -> dict[str, Tensor]:
        """The parameters that `tensors` become, by name."""
        stored = {dense.name: self._decoded(dense, None) for dense in tensors}
        return {
            name: self._as_in_model(name, value) for name, value in self._parameters.convert(stored).items()
        }

    def stored(self, name: str) -> Tensor | None:
        """The parameter `name`, which is in no layer; not copied where it can be as stored. None if it is missing."""
        for dense in self.outside.whole:
            target, pattern = self._parameters.target(dense.name)
            if target == name:
                if pattern is None and dense.kind == "plain":
                    return self._shards.tensor(self._stored[dense.parts["weight"]][1])
                return self.parameters_of([dense])[name]
        return None

    def router_of(self, layer: LayerWeights, kept: Sequence[int] | None) -> dict[str, Tensor]:
        """The parameters of a layer's router, for the experts `kept` in that order (None: all)."""
        stored = {}
        for tensor in layer.router:
            value = self._shards.tensor(tensor.stored)
            if kept is not None:
                value = self._cut(tensor, value, kept)
            stored[tensor.name] = value.to(self._device)
        return {
            name: self._as_in_model(name, value) for name, value in self._parameters.convert(stored).items()
        }

    def router_weight(self, number: int) -> tuple[Tensor, Tensor | None]:
        """The router's weight [experts, hidden] of layer `number` as stored, and its bias where there is one."""
        stored = [(t, self._shards.tensor(t.stored)) for t in self.layer(number).router]
        matrix = next(v for t, v in stored if v.ndim == 2 and t.role is Role.ROUTER and min(v.shape) > 1)
        return matrix, next((v for t, v in stored if t.name.endswith("bias")), None)

    def tail_of(self, number: int) -> int:
        """The rows of the router after those of experts."""
        return max((tensor.tail for tensor in self.layer(number).router), default=0)

    def expert_of(self, layer: LayerWeights, expert: int) -> dict[str, Tensor]:
        """The parameters of the expert `expert`, by their names in the experts module, without the axis of experts."""
        self.prefetch(layer, expert + AHEAD)
        stored = {d.name.replace(EXPERT, str(expert)): self._decoded(d, expert) for d in layer.experts}
        found = {}
        for name, value in self._parameters.convert(stored, one_expert=True).items():
            found[name.rpartition(".")[2]] = self._as_in_model(name, value[0])
        return found

    def prefetch(self, layer: LayerWeights, expert: int) -> None:
        """Have the weights of an expert read in the background, if there is one of that number."""
        for name in (name for dense in layer.experts for name in dense.parts.values()):
            tensor, ref = self._stored[name]
            if expert < self._spec.experts:
                self._shards.prefetch([_of_expert(tensor, ref, expert)])

    def release(self, layer: LayerWeights) -> None:
        """Let go of the mapped pages of `layer`."""
        names = [name for dense in (*layer.whole, *layer.experts) for name in dense.parts.values()]
        for tensor in (*layer.router, *(self._stored[name][0] for name in names)):
            for ref in tensor.pieces or (tensor.stored, *((tensor.scales,) if tensor.scales else ())):
                self._shards.release(ref)

    def check_complete(self, missing: Sequence[str]) -> None:
        """Raise InvalidInputError if a parameter is `missing`."""
        if missing:
            raise InvalidInputError(
                f"{self._where}: no tensor for '{printable(missing[0])}' of transformers' model "
                f"({len(missing)} parameters are missing); a file is missing, or transformers does not know these names"
            )

    def _decoded(self, dense: DenseTensor, expert: int | None) -> Tensor:
        parts = {}
        for part, name in dense.parts.items():
            tensor, ref = self._stored[name]
            if expert is not None:
                ref = _of_expert(tensor, ref, expert)
            parts[part] = self._shards.tensor(ref).to(self._device)
        return dense.decode(parts, self._dtype)

    def _as_in_model(self, name: str, value: Tensor) -> Tensor:
        """`value` in the dtype that the parameter `name` has in the model."""
        known = self._parameters.known.get(name)
        if known is not None and not known.is_floating_point():
            return value.to(self._device, known.dtype)
        dtype = self._dtype if known is None else known.dtype
        if self._dtype != torch.float32 and self._parameters.kept_in_float32(name):
            dtype = torch.float32
        return value.to(self._device, dtype)

    def _cut(self, tensor: ModelTensor, value: Tensor, kept: Sequence[int]) -> Tensor:
        experts = self._spec.experts
        if tensor.role is Role.ROUTING_TABLE:
            rows = array("q", value.long().flatten().tolist())
            values = Span(tensor.stored.shard, tensor.stored.offset, tensor.stored.nbytes)
            part = Remap(values, value.shape[1], rows.itemsize, tuple(kept), experts, tensor.name)
            numbers = np.array(remapped(rows, part, self._where))
            return torch.from_numpy(numbers).view_as(value)
        rows_kept = [*kept, *range(experts, experts + tensor.tail)]
        return value.index_select(tensor.axis, torch.tensor(rows_kept))


def _of_expert(tensor: ModelTensor, ref: TensorRef, expert: int) -> TensorRef:
    """Where the expert is: its own tensor, with the axis of experts left to the conversion; or a slice of one."""
    if tensor.pieces:
        return tensor.pieces[expert]
    nbytes = ref.nbytes // ref.shape[0]
    return replace(ref, shape=(1, *ref.shape[1:]), offset=ref.offset + expert * nbytes, nbytes=nbytes)
