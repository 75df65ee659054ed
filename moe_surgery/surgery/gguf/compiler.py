"""Plan x GGUF model -> `GgufPruneProgram`: which source bytes each output file is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.gguf.model_file import SPLIT_NAME, GgufModel, GgufTensor
from moe_surgery.checkpoint.gguf.writer import Metadata, TensorEntry, padding, preamble, tensor_table
from moe_surgery.engine.spans import Literal, Span
from moe_surgery.errors import PlanMismatchError, UsageError
from moe_surgery.families.base import Role
from moe_surgery.families.model_spec import ModelSpec, ModelTensor
from moe_surgery.selection.plan import Plan
from moe_surgery.surgery.gguf.metadata import (
    OWN,
    alignment_key,
    bytes_of,
    edited_metadata,
    source_digest,
    split_keys,
    structure_digest,
)
from moe_surgery.surgery.gguf.program import (
    GgufOutputFile,
    GgufOutputTensor,
    GgufPart,
    GgufPruneProgram,
    Head,
    Pad,
)
from moe_surgery.surgery.mtp import choose_mtp
from moe_surgery.surgery.program import SourceFile
from moe_surgery.surgery.routing import check_routing

__all__ = ["SUFFIX", "compile_gguf_prune"]

SUFFIX: Final = ".gguf"
DATA_ALIGNMENT: Final = 32
PADDING_KEY: Final = OWN + "padding"
MOST_EXPERTS: Final = 1024
"""llama.cpp aborts on more."""
MOST_FILES: Final = 99_999


def compile_gguf_prune(
    model: GgufModel,
    spec: ModelSpec,
    plan: Plan,
    *,
    name: str = "model.gguf",
    max_shard_size: int | None = None,
    mtp: str | None = None,
) -> GgufPruneProgram:
    """The program that writes `plan` applied to `model`, whose `spec` is that of `identify_gguf`.

    `name` is that of the output file. `max_shard_size` bounds the tensor bytes of a file, as far as one tensor fits;
    where several are needed they are called as llama.cpp wants (`model-00001-of-00003.gguf`). None: one file.
    `mtp`: "keep" (default) cuts blocks for multi-token prediction to the same number of experts (`mtp.choose_mtp`
    says which), "drop" leaves those blocks out.

    Raises PlanMismatchError for a plan of another model, one whose layers keep different numbers of experts, and one
    that llama.cpp would refuse or compute differently; UsageError for an unknown option.
    """
    if max_shard_size is not None and max_shard_size < 1:
        raise UsageError(f"`max_shard_size` {max_shard_size}: must be at least one byte")
    path = printable_path(model.path)
    plan.check_fits(
        spec.model_type, spec.experts, spec.layers, path, spec.layer_numbers, also=spec.model_types
    )
    kept = plan.uniform_experts
    if kept is None:
        counts = sorted({len(row) for row in plan.layers})
        raise PlanMismatchError(
            f"the plan keeps between {counts[0]} and {counts[-1]} experts per layer, but a GGUF file has one number "
            "for all layers; keep the same number in every layer"
        )
    if kept > MOST_EXPERTS:
        raise PlanMismatchError(f"{kept} experts in a layer: llama.cpp allows {MOST_EXPERTS}; keep fewer")
    top_k = min(plan.top_k or spec.top_k, kept)
    table = spec.dimensions["table_top_k"]
    if table and top_k != table and kept >= table:
        raise UsageError(
            f"`top_k` {top_k}: {path} has tables of {table} experts for each token, so its top-k cannot change"
        )
    plan = choose_mtp(model, spec, plan, top_k, mtp)
    check_routing(spec, plan, top_k)
    digest = source_digest(model, spec)
    keys = edited_metadata(model, spec, plan, top_k, digest)
    groups = _by_file(list(_tensors(model, spec, plan)), max_shard_size)
    if len(groups) > MOST_FILES:
        raise UsageError(f"`max_shard_size` {max_shard_size}: makes {len(groups):,} files; allow larger ones")
    names = _names(name, len(groups))
    total = sum(map(len, groups))
    files = []
    for number, (file_name, tensors) in enumerate(zip(names, groups, strict=True)):
        own = dict(keys) if number == 0 else alignment_key(model)
        if len(groups) > 1:
            own |= split_keys(number, len(groups), total)
        files.append(_file(file_name, bytes_of(own), len(own), tensors, model.alignment))
    return GgufPruneProgram(
        plan,
        spec.expert_format,
        spec.layout.name,
        tuple(SourceFile(n, s.nbytes, structure_digest(s)) for n, s in model.shards.items()),
        tuple(files),
        keys,
        model.alignment,
        (spec.without_mtp() if plan.mtp_layers == () else spec).parameters(kept),
        top_k,
        _origin(model, spec, digest),
    )


def _tensors(model: GgufModel, spec: ModelSpec, plan: Plan) -> Iterator[GgufOutputTensor]:
    """The tensors of the output, in the order of the source."""
    known = {tensor.name: tensor for tensor in spec.tensors}
    everything = tuple(range(spec.experts))
    for stored in model.tensors.values():
        tensor = known[stored.name]
        if tensor.mtp and plan.mtp_layers == ():
            continue
        kept = _kept(plan, tensor)
        if kept == everything:
            kept = None
        yield _tensor(stored, tensor, kept, spec.experts, model.alignment)


def _kept(plan: Plan, tensor: ModelTensor) -> tuple[int, ...] | None:
    """The experts that a tensor keeps; None where it is copied whole."""
    if tensor.layer is None:
        return None
    if not tensor.mtp:
        return plan.layers[tensor.layer]
    assert plan.mtp_layers
    return plan.mtp_layers[tensor.layer]


def _tensor(
    stored: GgufTensor, tensor: ModelTensor, kept: tuple[int, ...] | None, experts: int, alignment: int
) -> GgufOutputTensor:
    source = Span(stored.shard, stored.offset, stored.nbytes)
    renumbered = tensor.role is Role.ROUTING_TABLE
    cut = kept is not None and not renumbered
    shape = (len(kept), *tensor.shape[1:]) if cut and kept is not None else stored.shape
    nbytes = source.nbytes // experts * shape[0] if cut else source.nbytes
    return GgufOutputTensor(
        stored.name, stored.type, shape, source, kept, experts, padding(nbytes, alignment), renumbered
    )


def _by_file(tensors: list[GgufOutputTensor], most: int | None) -> list[list[GgufOutputTensor]]:
    """The tensors of each file, in order; a tensor larger than `most` bytes has its own."""
    files: list[list[GgufOutputTensor]] = [[]]
    used = 0
    for tensor in tensors:
        nbytes = tensor.nbytes + tensor.padding
        if most is not None and files[-1] and used + nbytes > most:
            files.append([])
            used = 0
        files[-1].append(tensor)
        used += nbytes
    return files


def _names(name: str, count: int) -> list[str]:
    if count == 1:
        return [name]
    split = SPLIT_NAME.fullmatch(name)
    prefix = split["prefix"] if split else name.removesuffix(SUFFIX)
    return [f"{prefix}-{number:05d}-of-{count:05d}{SUFFIX}" for number in range(1, count + 1)]


def _file(
    name: str, keys: list[GgufPart], count: int, tensors: Sequence[GgufOutputTensor], alignment: int
) -> GgufOutputFile:
    table = tensor_table([TensorEntry(t.name, t.type, t.shape, t.nbytes) for t in tensors], alignment)
    used = len(preamble(0, 0)) + sum(part.nbytes for part in keys) + len(table)
    if (filler := _filler(used, alignment)) is not None:
        keys, count, used = [*keys, filler], count + 1, used + filler.nbytes
    gap = padding(used, alignment)
    head = (*keys, Literal(table), *((Pad(gap),) if gap else ()))
    return GgufOutputFile(name, preamble(len(tensors), count), Head(head), tuple(tensors))


def _filler(used: int, alignment: int) -> Literal | None:
    """A key that moves the data of a file aligned to 16 to a multiple of 32, without which llama.cpp aborts."""
    if (used + padding(used, alignment)) % DATA_ALIGNMENT == 0:
        return None
    empty = Metadata()
    empty.text(PADDING_KEY, "")
    length = padding(used + len(empty.packed), DATA_ALIGNMENT)
    filled = Metadata()
    filled.text(PADDING_KEY, "-" * length)
    return Literal(bytes(filled.packed))


def _origin(model: GgufModel, spec: ModelSpec, digest: str) -> dict[str, object]:
    """The manifest's entries on the source; without local paths."""
    origin: dict[str, object] = {
        "name": model.name.encode("utf-8", "replace").decode(),
        "identity": digest,
        "expert_storage": spec.expert_format.name,
        "top_k": spec.top_k,
    }
    if model.files.hub_model is not None:
        hub_id, revision = model.files.hub_model
        origin |= {"base_model": hub_id, "base_model_from": "cache", "revision": revision}
    return origin
