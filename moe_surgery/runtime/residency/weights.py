"""Loads a checkpoint so that its experts stay on disk: what every token uses is read once, and held."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from moe_surgery.checkpoint.checkpoint import Checkpoint, TensorRef
from moe_surgery.checkpoint.direct_file import DirectFile
from moe_surgery.checkpoint.files import is_safetensors
from moe_surgery.errors import InvalidInputError, PlanMismatchError, UsageError
from moe_surgery.families import ModelSpec
from moe_surgery.families.base import Role
from moe_surgery.families.model_config import ModelConfig
from moe_surgery.runtime.device import HEADROOM_BYTES, free_memory
from moe_surgery.runtime.mapped import DTYPES
from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.residency.device_slots import DeviceSlots
from moe_surgery.runtime.residency.memory import Budget
from moe_surgery.runtime.residency.model import ResidentCausalLM
from moe_surgery.runtime.residency.pool import ExpertPool
from moe_surgery.runtime.residency.reads import Reads, open_reads, room
from moe_surgery.runtime.residency.slots import ExpertFiles, aligned_memory, placed
from moe_surgery.runtime.residency.usage import Usage, expected_use
from moe_surgery.selection.arguments import PathLike
from moe_surgery.selection.plan import Plan, load_plan
from moe_surgery.selection.statistics import Statistics, load_statistics

__all__ = ["ResidentWeights", "as_residency"]

SMALL_BYTES = 64 << 10
"""Tensors up to this size are read one by one, larger ones as `Reads` reads."""


def as_residency(start: Plan | Statistics | PathLike, spec: ModelSpec, where: str) -> Plan | Statistics:
    """`start`, or what it is the path of, if it is for this model; `where` names the model in errors.

    Raises PlanMismatchError if it is not, TypeError for anything else, and as `load_plan` and `load_statistics`.
    """
    if isinstance(start, (str, os.PathLike)):
        start = load_statistics(start) if is_safetensors(start) else load_plan(start)
    if isinstance(start, Plan):
        start.check_fits(spec.model_type, spec.experts, spec.layers, where)
    elif not isinstance(start, Statistics):
        raise TypeError(f"expected a Plan, Statistics or the path of one, not {type(start).__name__}")
    elif (start.layers, start.experts) != (spec.layers, spec.experts):
        raise PlanMismatchError(
            f"the statistics are of {start.layers} layers of {start.experts} experts, but {where} has {spec.layers} "
            f"of {spec.experts}; gather statistics of this model"
        )
    return start


class ResidentWeights:
    """The weights of one checkpoint under a limit on memory; `fetch` tensor by tensor, then `model`.

    The constructor reads no weights. It raises UsageError where the limit is too small, and where the files are not
    on this machine's disk.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        limit: int,
        start: Plan | Statistics | None,
        device: torch.device,
    ) -> None:
        config = ModelConfig.of(spec)
        names = spec.described.weights
        stored = {t.name: t for t in spec.tensors}
        weights = [t for t in spec.tensors if t.role is Role.EXPERT_WEIGHT]
        self._checkpoint = checkpoint
        self._experts = {t.stored.name: t for t in weights} | {t.scales.name: t for t in weights if t.scales}
        # Of the embedding a step reads a row per token; the last product reads all of it where it is shared.
        embedding = stored[names.embedding].stored
        self._embedding = embedding if names.unembedding in stored else None
        dense = sum(
            ref.nbytes
            for tensor in spec.tensors
            for ref in filter(None, (tensor.stored, tensor.scales))
            if not self._on_disk(ref)
        )
        parts: list[tuple[tuple[TensorRef, ...], tuple[TensorRef, ...]]] = []
        for number in range(spec.layers):
            found = [stored[name.format(layer=number)] for name in (names.layer.gate_up, names.layer.down)]
            gate_up, down = (tuple(filter(None, (t.stored, t.scales))) for t in found)
            parts.append((gate_up, down))
        _check_aligned(ref for layer in parts for part in layer for ref in part)
        self._device = device
        on_host = device.type == "cpu"
        slot = sum(room(ref.nbytes // ref.shape[0]) for part in parts[0] for ref in part)
        self._budget = Budget.of(limit, dense if on_host else 0, slot, config, spec.layers * spec.experts)
        self._files = _direct_files(checkpoint)
        self._reads = open_reads(self._files.values())
        usage = Usage(expected_use(start, spec.layers, spec.experts, config.num_experts_per_tok))
        self._pool = ExpertPool(
            ExpertFiles(self._files, parts),
            self._reads,
            usage,
            self._budget.slots,
            pinned=device.type == "cuda",
        )

    def _on_disk(self, ref: TensorRef) -> bool:
        """Whether `ref` is read when it is needed."""
        return ref.name in self._experts or ref == self._embedding

    def fetch(self, ref: TensorRef) -> Tensor:
        """The tensor at `ref`, read into the device's memory; without memory (device "meta") where its parts are read
        later."""
        if self._on_disk(ref):
            return torch.empty(ref.shape, dtype=DTYPES[ref.dtype], device="meta")
        return self._read(ref).to(self._device)

    def _read(self, ref: TensorRef) -> Tensor:
        dtype = DTYPES[ref.dtype]
        if ref.nbytes <= SMALL_BYTES or ref.offset % dtype.itemsize:
            raw = bytearray(ref.nbytes)
            self._checkpoint.shards[ref.shard].read_into(ref.offset, memoryview(raw))
            return torch.frombuffer(raw, dtype=dtype).view(ref.shape)
        read, tensor = placed(self._files[ref.shard], ref, aligned_memory(room(ref.nbytes)), 0)
        self._reads.read([read])
        return tensor

    def model(self, model: CausalLM) -> ResidentCausalLM:
        """`model`, made of fetched tensors, with the pool; experts that are expected to be used are being read."""
        rows = None if self._embedding is None else _row_reader(self._embedding, self._files, self._reads)
        self._pool.fill()
        resident = ResidentCausalLM.of(model, self._pool, self._budget, rows)
        free = free_memory(self._device)
        if free is not None:
            capacity = max(0, free - HEADROOM_BYTES) // self._pool.files.nbytes
            resident.device_slots = DeviceSlots(self._pool, self._device, max(1, capacity))
        return resident

    def close(self) -> None:
        """End the threads: for where loading fails. A model's end when nothing refers to it any more."""
        self._pool.close()


def _direct_files(checkpoint: Checkpoint) -> dict[str, DirectFile]:
    files = {}
    for name, shard in checkpoint.shards.items():
        file = shard.source.direct()
        if file is None:
            raise UsageError(f"{shard.where}: `memory` needs files on this machine's disk")
        files[name] = file
    return files


def _check_aligned(refs: Iterable[TensorRef]) -> None:
    for ref in refs:
        size = DTYPES[ref.dtype].itemsize
        if ref.offset % size or (ref.nbytes // ref.shape[0]) % size:
            raise InvalidInputError(
                f"{ref.shard}: {ref.name} is at byte {ref.offset}, not a multiple of its elements' {size} bytes; "
                "write the file again with the safetensors library, or load it without `memory`"
            )


def _row_reader(
    embedding: TensorRef, files: dict[str, DirectFile], reads: Reads
) -> Callable[[Tensor], Tensor]:
    """A function that reads the rows of `embedding` for ids int64 [...]: [..., hidden] as stored."""
    file = files[embedding.shard]
    space = room(embedding.nbytes // embedding.shape[0])

    def rows(ids: Tensor) -> Tensor:
        distinct, places = torch.unique(ids, return_inverse=True)
        memory = aligned_memory(len(distinct) * space)
        wanted = [
            placed(file, embedding.rows(row, 1), memory, number * space)
            for number, row in enumerate(distinct.tolist())
        ]
        reads.read([read for read, _ in wanted])
        return torch.cat([tensor for _, tensor in wanted])[places]

    return rows
