"""From a checkpoint to a `CausalLM`: weights as views of the mapped shards, or copied to a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from threading import Thread
from typing import overload

import torch
from torch import Tensor

from moe_surgery.checkpoint.checkpoint import Checkpoint, TensorRef
from moe_surgery.checkpoint.resolve import download_command
from moe_surgery.checkpoint.source import Folder
from moe_surgery.errors import OutputError, UsageError
from moe_surgery.families import FAMILIES, AnyFamily, ModelSpec, ModelTensor, identify_model
from moe_surgery.families.base import LayerNames, ProjectionNames
from moe_surgery.families.model_config import ModelConfig
from moe_surgery.kernels import Backend, select_backend
from moe_surgery.kernels.q8_0 import DENSE, Matrix, quantise
from moe_surgery.kernels.weights import DenseWeight, ExpertWeights, Layer, Mxfp4Weight, Projection, Weight
from moe_surgery.runtime.device import check_memory, open_device
from moe_surgery.runtime.mapped import MappedShards
from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.residency.memory import memory_limit, warn_if_larger_than_memory
from moe_surgery.runtime.residency.weights import ResidentWeights, as_residency
from moe_surgery.runtime.view import view_layer
from moe_surgery.selection.arguments import PathLike
from moe_surgery.selection.plan import Plan, as_plan, check_top_k
from moe_surgery.selection.statistics import Statistics

__all__ = ["DTYPES", "check_on_disk", "load_model"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Get = Callable[[str], Tensor]


class OneLayer(Sequence[Layer]):
    """Layers of which only the last one accessed is in memory, and the next one is being read in."""

    def __init__(
        self,
        count: int,
        make: Callable[[int], Layer],
        read_ahead: Callable[[int], None],
        release: Callable[[int], None],
    ) -> None:
        self._count, self._make, self._read_ahead, self._release = count, make, read_ahead, release
        self._number: int | None = None
        self._layer: Layer | None = None

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, number: int) -> Layer: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Layer]: ...
    def __getitem__(self, number: int | slice) -> Layer | Sequence[Layer]:
        if isinstance(number, slice) or not 0 <= number < self._count:
            raise IndexError(f"layer {number} of {self._count}: layers are loaded one at a time, by number")
        if self._layer is None or self._number != number:
            self.close()
            self._number, self._layer = number, self._make(number)
            if number + 1 < self._count:
                self._read_ahead(number + 1)
        return self._layer

    def close(self) -> None:
        """Release the layer that is in memory."""
        if self._number is not None:
            self._release(self._number)
        self._number = self._layer = None


def load_model(
    path: PathLike | Folder,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    plan: Plan | PathLike | None = None,
    backend: str | None = None,
    *,
    top_k: int | None = None,
    dense: str = "keep",
    one_layer: bool = False,
    memory: int | str | None = None,
    residency: Plan | Statistics | PathLike | None = None,
    families: tuple[AnyFamily, ...] = FAMILIES,
) -> CausalLM:
    """Load a checkpoint (folder, file, example, hub id in the local cache, or `Folder`) to run it.

    On the CPU weights are views of the mapped files: loading reads only headers. To other devices they are
    copied tensor by tensor, so host memory stays bounded. MXFP4 experts stay packed
    everywhere. `dtype` is the compute dtype: unless given, float32 with the native backend (whose
    products with MXFP4 weights round activations to 16-bit integers) and bfloat16 with the others. `plan`
    (a `Plan`, or the path of a plan file) restricts each layer to its kept experts without copying weights;
    layers may keep different numbers, and logits are those of the checkpoint pruned by that plan, bit for bit.
    `top_k` replaces the plan's or the model's number of experts per token; it may be larger, up to the experts
    of a layer (a layer with fewer uses all of them). `dense` "q8_0" holds attention's matrices and the
    unembedding in 8 bits, quantised when loading, with the values that `export_gguf(dense="q8_0")` writes: private
    memory of about half their size in BF16. The embedding, of which a step reads one row a token, and the
    router stay as stored. The triton backend does not have it. With `one_layer` a layer is mapped, or copied to the
    device, when `CausalLM.layers` is indexed, and released for the next one: for passes that take all texts
    through one layer at a time (files that cannot be mapped stay open as long as the model). `families` are the
    model families to recognise.

    With `memory`, bytes or a size such as "8GB", the process stays below that much: weights that every token uses
    are held, and as many experts as fit; the others are read from disk when a token needs them. Results are those
    of the whole model, with the native backend bit for bit. `residency`, statistics or a plan, says which experts to
    hold first; use decides later. On another device than the CPU the limit is that of host memory, from which
    experts are copied to the device; weights that every token uses have to fit there. Without `memory` a
    CheckpointWarning says if the weights do not fit what is free.

    Raises InvalidInputError or OutputError for the checkpoint, InvalidInputError for a value that Q8_0 cannot
    hold, PlanMismatchError for a plan of another model, UsageError for an unknown device, dtype, `dense` or
    backend, a top-k outside 1 to the number of experts, a device without the memory, a `memory` below the least, or
    `memory` together with `dense`.
    """
    plan = None if plan is None else as_plan(plan)
    torch_device = open_device(device)
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"`dtype` {dtype}: choose one of {', '.join(map(str, DTYPES))}")
    chosen_backend = select_backend(torch_device, backend)
    if dense not in DENSE:
        raise UsageError(f"`dense` {dense}: choose one of {', '.join(DENSE)}")
    if dense == "q8_0" and not chosen_backend.reads_q8_0:
        raise UsageError(
            f"`dense` q8_0: the {chosen_backend.name} backend does not read Q8_0; choose `backend` reference, or "
            "`dense` keep"
        )
    compute_dtype = chosen_backend.dtype if dtype is None else dtype
    with ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint.open(path))
        check_on_disk(checkpoint)
        spec = identify_model(checkpoint, families)
        spec.require_description()
        if plan is not None:
            plan.check_fits(spec.model_type, spec.experts, spec.layers, str(path))
            plan = plan.with_top_k(top_k)
        elif top_k is not None:
            check_top_k(top_k, spec.experts, f"{path} has")
        if not one_layer and memory is None:
            check_memory(torch_device, spec)
        resident = _resident(checkpoint, spec, torch_device, memory, residency, one_layer, dense)
        if resident is None and not one_layer and torch_device.type == "cpu":
            warn_if_larger_than_memory(checkpoint)
        model = _assemble(
            checkpoint,
            spec,
            plan,
            top_k,
            torch_device,
            compute_dtype,
            chosen_backend,
            dense,
            one_layer,
            resident,
        )
        if one_layer and any(shard.source.map() is None for shard in checkpoint.shards.values()):
            stack.pop_all()  # layers are yet to be read
        return model


def _resident(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    device: torch.device,
    memory: int | str | None,
    residency: Plan | Statistics | PathLike | None,
    one_layer: bool,
    dense: str,
) -> ResidentWeights | None:
    """The weights under the limit `memory`, None without one. Raises as `load_model`."""
    if memory is None:
        if residency is not None:
            raise UsageError("`residency` needs `memory`")
        return None
    if one_layer or dense != "keep":
        raise UsageError(f"choose one of `memory` and `{'one_layer' if one_layer else 'dense'}`")
    start = None if residency is None else as_residency(residency, spec, str(checkpoint.path))
    return ResidentWeights(checkpoint, spec, memory_limit(memory), start, device)


def check_on_disk(checkpoint: Checkpoint) -> None:
    """Raise OutputError where weights would have to be fetched from the hub."""
    files = checkpoint.files
    if files.hub_model is not None and any(map(files.bytes_to_fetch, checkpoint.shards)):
        raise OutputError(
            f"{files}: is on the hub, and running a model needs its weights on this machine; download it first: "
            + download_command(*files.hub_model)
        )


def _assemble(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    plan: Plan | None,
    top_k: int | None,
    device: torch.device,
    compute_dtype: torch.dtype,
    backend: Backend,
    dense: str,
    one_layer: bool,
    resident: ResidentWeights | None,
) -> CausalLM:
    config = ModelConfig.of(spec)
    shards = MappedShards(checkpoint)
    tensors = {t.name: t for t in spec.tensors}
    names = spec.described.weights

    def fetch(ref: TensorRef) -> Tensor:
        if resident is not None:
            return resident.fetch(ref)
        mapped = shards.tensor(ref)
        if device.type == "cpu":
            return mapped
        copied = mapped.to(device)
        shards.release(ref)
        return copied

    def get(name: str) -> Tensor:
        return fetch(tensors[name].stored)

    def matrix(name: str) -> Matrix:
        if dense == "keep":
            return get(name)
        ref = tensors[name].stored
        quantised = quantise(shards.tensor(ref), f"{checkpoint.shards[ref.shard].where}: tensor {name!r}")
        shards.release(ref)
        return quantised.to(device)

    embedding = get(names.embedding)

    def make(number: int) -> Layer:
        layer = _layer(number, names.layer, config, tensors, get, matrix, fetch, plan, top_k)
        # For decode steps of this model and of its views, which share the tensors.
        return layer if one_layer else backend.prepare_layer(layer)

    def stored(number: int) -> list[TensorRef]:
        parts = (part for t in spec.tensors if t.layer == number for part in (t.stored, t.scales))
        return [part for part in parts if part is not None]

    reading: Thread | None = None

    def read_ahead(number: int) -> None:
        nonlocal reading
        reading = shards.read_ahead(stored(number), reading)

    def release(number: int) -> None:
        for ref in stored(number):
            shards.release(ref)

    if one_layer:
        shards.prefetch(stored(0))  # while the caller gets its texts
    layers: Sequence[Layer] = (
        OneLayer(config.num_hidden_layers, make, read_ahead, release)
        if one_layer
        else [make(n) for n in range(config.num_hidden_layers)]
    )
    unembedding: Matrix = embedding
    if names.unembedding in tensors or dense != "keep":
        unembedding = matrix(names.unembedding if names.unembedding in tensors else names.embedding)
    norm = get(names.norm)
    model = CausalLM(config, embedding, layers, norm, unembedding, compute_dtype, backend)
    return model if resident is None else resident.model(model)


def _layer(
    number: int,
    names: LayerNames,
    config: ModelConfig,
    tensors: dict[str, ModelTensor],
    get: Get,
    matrix: Callable[[str], Matrix],
    fetch: Callable[[TensorRef], Tensor],
    plan: Plan | None,
    top_k: int | None,
) -> Layer:
    def named(name: str) -> str:
        return name.format(layer=number)

    def vector(name: str) -> Tensor:
        return get(named(name))

    def bias(part: ProjectionNames) -> Tensor | None:
        return vector(part.bias) if named(part.bias) in tensors else None

    def projection(part: ProjectionNames) -> Projection[Matrix]:
        return Projection(matrix(named(part.weight)), bias(part))

    def weight(name: str) -> Weight:
        tensor = tensors[named(name)]
        if tensor.scales is None:
            return DenseWeight(fetch(tensor.stored))
        return Mxfp4Weight(fetch(tensor.stored), fetch(tensor.scales))

    router = Projection(vector(names.router.weight), bias(names.router))
    experts = ExpertWeights(
        weight(names.gate_up),
        vector(names.gate_up_bias),
        weight(names.down),
        vector(names.down_bias),
        None,
        config.swiglu_limit,
        config.swiglu_alpha,
    )
    layer = Layer(
        attention_norm=vector(names.attention_norm),
        q=projection(names.q),
        k=projection(names.k),
        v=projection(names.v),
        o=projection(names.o),
        sinks=vector(names.sinks),
        mlp_norm=vector(names.mlp_norm),
        router=router,
        experts=experts,
        top_k=min(top_k or config.num_experts_per_tok, router.weight.shape[0]),
    )
    return layer if plan is None else view_layer(layer, plan.layers[number], plan.top_k)
