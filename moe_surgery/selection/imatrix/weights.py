"""What rankings from an importance matrix read of a model: the norm before a router, and columns of down projections.

A matrix names weights as GGUF does; a safetensors checkpoint is asked by the numbers of layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from moe_surgery.checkpoint.gguf.block_types import BlockType
from moe_surgery.checkpoint.gguf.model_file import GgufModel, GgufTensor
from moe_surgery.families.base import Family
from moe_surgery.families.gguf import architecture_of
from moe_surgery.families.model_spec import ModelSpec

if TYPE_CHECKING:
    from moe_surgery.checkpoint.checkpoint import Checkpoint, TensorRef
    from moe_surgery.families.model_spec import ModelTensor

__all__ = ["CheckpointWeights", "GgufWeights", "Weights", "dequantises"]

Floats = npt.NDArray[np.float64]

_PLAIN: Final = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
STRIP_VALUES: Final = 1 << 20
"""Values of a GGUF weight that are dequantised at a time."""
# Their routers do not read what the norm gives, or experts read something else than the router.
ROUTER_READS_OTHERS: Final = frozenset({"llama4", "smallthinker", "kimi-k3", "nemotron_h_moe", "gemma4"})


class Weights(ABC):
    """The weights of an open model, read as they are asked for."""

    where: str
    remote: bool
    """Whether reading weights fetches them over a network."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec

    @property
    def same_inputs(self) -> bool:
        """Whether experts read what the router reads, unweighted, as almost everywhere."""
        return True

    @abstractmethod
    def shape(self, name: str) -> tuple[int, int] | None:
        """(experts, inputs) of the weight that GGUF calls `name`, 1 expert for a dense one; None if not known."""

    @abstractmethod
    def norm(self, layer: int) -> Floats | None:
        """The weight of the RMSNorm before the router of layer number `layer`, float64 [hidden]; None if not known."""

    @abstractmethod
    def why_no_energy(self) -> str | None:
        """What keeps the down projections from being read, None where nothing does."""

    @abstractmethod
    def down_norms(self, layer: int) -> Iterator[Floats]:
        """For each expert, the squared norms of the columns of its down projection, float64 [inputs]."""


class GgufWeights(Weights):
    def __init__(self, spec: ModelSpec, model: GgufModel) -> None:
        super().__init__(spec)
        self._model = model
        self.where, self.remote = str(model.path), model.files.on_disk is None
        self._architecture = str(model.value("general.architecture"))

    @property
    def same_inputs(self) -> bool:
        return self._architecture not in ROUTER_READS_OTHERS

    def shape(self, name: str) -> tuple[int, int] | None:
        tensor = self._model.tensors.get(name)
        if tensor is None:
            return None
        return (tensor.shape[0] if len(tensor.shape) == 3 else 1), tensor.shape[-1]

    def norm(self, layer: int) -> Floats | None:
        if not self.same_inputs:
            return None
        name = architecture_of(self._architecture).norm
        tensor = self._model.tensors.get(f"blk.{layer}.{name}")
        if tensor is None or tensor.type.name not in _PLAIN or len(tensor.shape) != 1:
            return None
        return _plain(self._read(tensor, 0, tensor.nbytes), tensor.type)

    def why_no_energy(self) -> str | None:
        types = {}
        for layer in self.spec.layer_numbers:
            tensor = self._down(layer)
            if tensor is None:
                return f"block {layer} has no stacked down projections"
            types[tensor.type.name] = tensor.type
        if missing := next((t for t in types.values() if t.name not in _PLAIN and not dequantises(t)), None):
            if find_spec("gguf") is None:
                return "the gguf package is not installed (pip install 'moe-surgery[gguf]')"
            return f"the gguf package does not dequantise {missing.name}"
        return None

    def down_norms(self, layer: int) -> Iterator[Floats]:
        tensor = self._down(layer)
        assert tensor is not None
        experts, rows, columns = tensor.shape
        row_bytes = tensor.type.row_bytes(columns)
        strip = max(STRIP_VALUES // columns, 1)
        scales = self._scales(layer, experts)
        for expert in range(experts):
            total = np.zeros(columns)
            for first in range(0, rows, strip):
                count = min(strip, rows - first)
                raw = self._read(tensor, (expert * rows + first) * row_bytes, count * row_bytes)
                values = _values(raw.reshape(count, row_bytes), tensor.type)
                total += np.einsum("rc,rc->c", values, values)
            yield total * scales[expert] ** 2

    def _down(self, layer: int) -> GgufTensor | None:
        tensor = self._model.tensors.get(f"blk.{layer}.ffn_down_exps.weight")
        return tensor if tensor is not None and len(tensor.shape) == 3 else None

    def _scales(self, layer: int, experts: int) -> Floats:
        """Factors of the experts' down projections, which NVFP4 files and gemma4 store beside them."""
        tensor = self._model.tensors.get(f"blk.{layer}.ffn_down_exps.scale")
        if tensor is None or tensor.type.name != "F32" or tensor.shape != (experts,):
            return np.ones(experts)
        return _plain(self._read(tensor, 0, tensor.nbytes), tensor.type)

    def _read(self, tensor: GgufTensor, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        source = self._model.shards[tensor.shard].source
        return np.frombuffer(source.read(tensor.offset + offset, nbytes), np.uint8)


def dequantises(kind: BlockType) -> bool:
    """Whether the gguf package is installed and dequantises tensors of this type."""
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import _type_traits  # what `dequantize` looks types up in

        return kind.name == "BF16" or GGMLQuantizationType[kind.name] in _type_traits
    except (ImportError, KeyError):
        return kind.name == "BF16"


def _values(rows: npt.NDArray[np.uint8], kind: BlockType) -> Floats:
    """Rows of bytes [R, row bytes] as values, float64 [R, columns]."""
    if kind.name in _PLAIN:
        return rows.view(_PLAIN[kind.name]).astype(np.float64)
    if kind.name == "BF16":
        return _bf16(rows.view(np.uint16))
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    return dequantize(rows, GGMLQuantizationType[kind.name]).astype(np.float64)


def _plain(raw: npt.NDArray[np.uint8], kind: BlockType) -> Floats:
    return raw.view(_PLAIN[kind.name]).astype(np.float64)


def _bf16(words: npt.NDArray[np.uint16]) -> Floats:
    wide: npt.NDArray[Any] = words.astype(np.uint32) << np.uint32(16)
    return np.asarray(wide.view(np.float32), np.float64)


class CheckpointWeights(Weights):
    """Of a safetensors checkpoint. Families that are known by tensor names alone have no norms and columns."""

    def __init__(self, spec: ModelSpec, checkpoint: Checkpoint) -> None:
        super().__init__(spec)
        self._checkpoint = checkpoint
        self.where, self.remote = str(checkpoint.path), checkpoint.files.on_disk is None
        self._tensors = {tensor.name: tensor for tensor in spec.tensors}

    def shape(self, name: str) -> tuple[int, int] | None:
        prefix, _, rest = name.partition(".ffn_")
        if not isinstance(self.spec.family, Family) or not rest:
            return None
        names, layer = self.spec.family.weights.layer, int(prefix.removeprefix("blk."))
        experts = self.spec.experts
        inputs = {
            "gate_inp.weight": (1, names.router.weight),
            "gate_exps.weight": (experts, names.gate_up),
            "up_exps.weight": (experts, names.gate_up),
            "gate_up_exps.weight": (experts, names.gate_up),
            "down_exps.weight": (experts, names.down),
        }.get(rest)
        tensor = None if inputs is None else self._tensors.get(inputs[1].format(layer=layer))
        return None if inputs is None or tensor is None else (inputs[0], tensor.shape[-1])

    def norm(self, layer: int) -> Floats | None:
        if not isinstance(self.spec.family, Family):
            return None
        tensor = self._tensors.get(self.spec.family.weights.layer.mlp_norm.format(layer=layer))
        return None if tensor is None else _dense(self._read(tensor.stored), tensor.stored.dtype)

    def why_no_energy(self) -> str | None:
        if isinstance(self.spec.family, Family):
            return None
        return f"weights of {self.spec.family.title} checkpoints are not read, only copied"

    def down_norms(self, layer: int) -> Iterator[Floats]:
        family = self.spec.described
        tensor = self._tensors[family.weights.layer.down.format(layer=layer)]
        for expert in range(self.spec.experts):
            values = self._down(tensor, expert)
            yield np.einsum("rc,rc->c", values, values)

    def _down(self, tensor: ModelTensor, expert: int) -> Floats:
        """The down projection of an expert, float64 [hidden, inputs]."""
        stored = tensor.stored.rows(expert, 1)
        if tensor.scales is None:  # dense weights are stored transposed
            return np.asarray(_dense(self._read(stored), stored.dtype).reshape(stored.shape[1:]).T)
        from moe_surgery.formats.mxfp4 import decode

        scales = tensor.scales.rows(expert, 1)
        blocks = self._read(stored).reshape(stored.shape[1:])
        return _bf16(decode(blocks, self._read(scales).reshape(scales.shape[1:])))

    def _read(self, ref: TensorRef) -> npt.NDArray[np.uint8]:
        return np.frombuffer(self._checkpoint.shards[ref.shard].source.read(ref.offset, ref.nbytes), np.uint8)


def _dense(raw: npt.NDArray[np.uint8], dtype: str) -> Floats:
    values: Any = (
        _bf16(raw.view(np.uint16)) if dtype == "BF16" else raw.view(_PLAIN[dtype]).astype(np.float64)
    )
    return np.asarray(values)
