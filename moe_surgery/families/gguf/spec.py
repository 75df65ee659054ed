"""Checks a GGUF model against the naming rule of `tensors` and its own counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import MappingProxyType

from moe_surgery.checkpoint.checkpoint import TensorRef
from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.gguf.block_types import BY_NAME
from moe_surgery.checkpoint.gguf.model_file import GgufModel
from moe_surgery.errors import InvalidInputError
from moe_surgery.families.base import GgufFamily, Layout, Role
from moe_surgery.families.gguf.counts import Counts, read_counts
from moe_surgery.families.gguf.tensors import (
    BLOCK,
    ROUTER,
    TABLE,
    expert_role,
    is_numbered_expert,
    looks_like_experts,
    whole_role,
)
from moe_surgery.families.model_spec import ModelSpec, ModelTensor
from moe_surgery.formats.expert_format import AS_STORED

__all__ = ["identify_gguf"]

_PROJECTIONS = (("ffn_down_exps.weight",), ("ffn_up_exps.weight", "ffn_gate_up_exps.weight"))
"""Of each one, a block with experts has a tensor."""


@dataclass(slots=True)
class _Block:
    number: int
    experts: dict[str, TensorRef] = field(default_factory=dict)
    """By the name after `blk.N.`."""


def identify_gguf(model: GgufModel) -> ModelSpec:
    """The experts of `model`, all of its tensors checked.

    `ModelSpec.refusal` says why a model whose file is sound cannot be cut. Raises InvalidInputError, one line naming
    the tensor or key, for a model without experts, for counts that disagree, and for tensors that may count experts
    and are not known.
    """
    counts = read_counts(model)
    whole, blocks = _sorted_by_block(model, counts)
    moe = [block for block in blocks if ROUTER in block.experts]
    for block in blocks:
        _check_block(model, block)
    first_mtp = counts.blocks - counts.mtp
    main = [block for block in moe if block.number < first_mtp]
    if not main:
        raise InvalidInputError(
            f"{printable_path(model.path)}: counts {counts.experts} experts, but no block has a router "
            f"(blk.N.{ROUTER}); a file is missing, or the model was saved without it"
        )
    tensors = list(whole)
    rows = {False: 0, True: 0}
    for block in moe:
        mtp = block.number >= first_mtp
        for rest, ref in block.experts.items():
            tensors.append(_tensor(model, counts, rest, ref, rows[mtp], mtp))
        rows[mtp] += 1
    numbers = tuple(block.number for block in main)
    tables = [block.experts[TABLE] for block in moe if TABLE in block.experts]
    table_k = max((ref.shape[1] for ref in tables), default=1)
    return ModelSpec(
        GgufFamily(
            counts.architecture.model_types[0],
            counts.architecture.title,
            counts.architecture.name,
            counts.routing,
            counts.architecture.model_types,
        ),
        Layout("GGUF", "llama.cpp"),
        MappingProxyType({}),
        {
            "layers": len(main),
            "experts": counts.experts,
            "top_k": counts.top_k,
            "hidden_layers": counts.blocks - counts.mtp,
            "mtp_blocks": counts.mtp,
            "table_top_k": table_k if tables else 0,
        },
        tuple(tensors),
        AS_STORED._replace(label=_label(tensors)),
        _notes(counts),
        () if numbers == tuple(range(len(numbers))) else numbers,
        tuple(f"blk.{block.number}" for block in moe if block.number >= first_mtp),
        counts.grouping,
        max(counts.minimum, table_k),
        _refusal(counts),
    )


def _sorted_by_block(model: GgufModel, counts: Counts) -> tuple[list[ModelTensor], list[_Block]]:
    """The tensors that are copied whole, and those of each block that count experts."""
    whole: list[ModelTensor] = []
    blocks: dict[int, _Block] = {}
    for name, tensor in model.tensors.items():
        ref = TensorRef(name, tensor.shard, tensor.type.name, tensor.shape, tensor.offset, tensor.nbytes)
        found = BLOCK.fullmatch(name)
        rest = found[2] if found else name
        number = int(found[1]) if found else -1
        if number >= counts.blocks:
            raise InvalidInputError(
                f"{model.where(name)}: is in block {number}, but "
                f"{counts.architecture.name}.block_count is {counts.blocks}"
            )
        if is_numbered_expert(rest):
            raise InvalidInputError(
                f"{model.where(name)}: holds a single expert, as in Mixtral files before April 2024, "
                "which llama.cpp no longer reads; convert the model again"
            )
        role = expert_role(rest) if found else None
        if role is not None:
            blocks.setdefault(number, _Block(number)).experts[rest] = ref
            continue
        if looks_like_experts(rest):
            raise InvalidInputError(
                f"{model.where(name)}: may count experts, but is not known here; it is neither cut nor copied"
            )
        mtp = number >= counts.blocks - counts.mtp
        whole.append(ModelTensor(name, whole_role(rest), None, ref.shape, ref, mtp=mtp))
    return whole, sorted(blocks.values(), key=lambda block: block.number)


def _check_block(model: GgufModel, block: _Block) -> None:
    """Raise InvalidInputError for experts without a router, and a router without experts."""
    prefix = f"blk.{block.number}."
    if ROUTER not in block.experts:
        name = prefix + next(iter(block.experts))
        raise InvalidInputError(
            f"{model.where(name)}: counts experts, but its block has no router ({prefix}{ROUTER}); a file is missing, "
            "or the model was saved without it"
        )
    for names in _PROJECTIONS:
        if not any(name in block.experts for name in names):
            raise InvalidInputError(
                f"{model.where(prefix + ROUTER)}: is the router of a block without {prefix}{names[0]}; a file is "
                "missing, or the model was saved without it"
            )


def _tensor(model: GgufModel, counts: Counts, rest: str, ref: TensorRef, row: int, mtp: bool) -> ModelTensor:
    """A checked tensor of a block with experts."""
    role = expert_role(rest)
    assert role is not None
    if role is Role.ROUTING_TABLE:
        if ref.dtype not in ("I32", "I64") or len(ref.shape) != 2:
            raise InvalidInputError(
                f"{model.where(ref.name)}: {ref.dtype} {list(ref.shape)}, expected I32 of [vocabulary, top-k]"
            )
        return ModelTensor(ref.name, role, row, ref.shape, ref, mtp=mtp, values=0)
    chunked = rest.endswith("_chexps.weight") and counts.experts_per_group > 1
    expected = counts.experts // counts.experts_per_group if chunked else counts.experts
    shape = ref.shape
    if counts.experts == 1 and (not shape or shape[0] != 1):
        shape = (1, *shape)  # writers leave out dimensions of one
    if not shape or shape[0] != expected:
        raise InvalidInputError(
            f"{model.where(ref.name)}: has {shape[0] if shape else 0} entries on its outermost axis, but "
            f"{counts.architecture.name}.expert_count is {counts.experts}"
        )
    kind = BY_NAME[ref.dtype]
    rows = 1
    for size in shape[1:-1]:
        rows *= size
    whole_rows = len(shape) > 1 or (kind.block_values == 1 and not kind.row_header)
    if not whole_rows or rows % kind.row_group:
        raise InvalidInputError(
            f"{model.where(ref.name)}: is stored as {kind.name}, "
            + (
                f"whose rows are interleaved by {kind.row_group}, and each expert has {rows}"
                if kind.row_group > 1
                else "whose blocks span several experts"
            )
            + ": experts cannot be cut out of it; quantise this tensor to another type"
        )
    return ModelTensor(ref.name, role, row, shape, ref, mtp=mtp)


def _label(tensors: list[ModelTensor]) -> str:
    return " and ".join(_by_size(t for t in tensors if t.role is Role.EXPERT_WEIGHT))


def _by_size(tensors: Iterable[ModelTensor]) -> list[str]:
    """The types of `tensors`, that of the most bytes first."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.stored.dtype] = sizes.get(tensor.stored.dtype, 0) + tensor.nbytes
    return sorted(sizes, key=lambda name: -sizes[name])


def _refusal(counts: Counts) -> str | None:
    architecture = counts.architecture
    why = dict(architecture.refused_counts).get(counts.experts)
    if why is not None:
        return f"{architecture.title} with {counts.experts} experts cannot be pruned as a GGUF file: {why}"
    if counts.experts_per_group > 1:
        return (
            f"{architecture.title} with groups of {counts.experts_per_group} experts "
            f"({architecture.name}.experts_per_group) cannot be pruned: llama.cpp takes the weight of a group's own "
            "expert from whichever expert has the group's number, so any other choice of experts changes the model"
        )
    return None


def _notes(counts: Counts) -> tuple[str, ...]:
    if counts.architecture.known:
        return ()
    return (
        f"architecture {counts.architecture.name} is not known to this version of moe-surgery; its experts are found "
        "by the names that all architectures share",
    )
