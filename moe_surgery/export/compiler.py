"""Checkpoint (x plan) -> `GgufProgram`: the source bytes of each tensor and their conversion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import MappingProxyType
from typing import Final

from moe_surgery.checkpoint.checkpoint import Checkpoint, TensorRef
from moe_surgery.checkpoint.gguf.block_types import BY_NAME, BlockType
from moe_surgery.checkpoint.gguf.writer import Metadata, TensorEntry, header, padding
from moe_surgery.checkpoint.source import Folder
from moe_surgery.engine.spans import Copy, Span, coalesce
from moe_surgery.errors import InvalidInputError, PlanMismatchError, UsageError
from moe_surgery.export.ggml import BLOCK_VALUES
from moe_surgery.export.program import (
    GgufPart,
    GgufProgram,
    GgufTensor,
    Pack,
    Pad,
    Quantise,
    QuantiseQ8,
    Transpose,
    Widen,
)
from moe_surgery.export.tokenizer import Tokenizer, add_tokenizer
from moe_surgery.families.base import Role
from moe_surgery.families.gguf_architecture import GgufArchitecture
from moe_surgery.families.model_config import ModelConfig
from moe_surgery.families.model_spec import ModelSpec, ModelTensor
from moe_surgery.formats import q8_0
from moe_surgery.formats.expert_format import BF16, F16, F32, MXFP4, ExpertFormat, format_of_dtype
from moe_surgery.selection.plan import Plan

__all__ = ["DENSE", "STORES", "compile_gguf", "default_name"]

STORES = ("keep", "mxfp4")
DENSE = ("keep", "q8_0")
FILE_TYPES: Final = MappingProxyType({F32: 0, F16: 1, BF16: 32, MXFP4: 38})
"""llama.cpp's numbers by the type of the experts: its MXFP4_MOE stands for MXFP4 experts beside BF16 as well as
beside Q8_0 matrices."""
QUANTIZATION_VERSION: Final = 2
# Roles that llama.cpp needs in float32, like all tensors with one axis.
_FLOAT32 = (Role.ROUTER, Role.EXPERT_BIAS)


def compile_gguf(
    checkpoint: Checkpoint,
    model: ModelSpec,
    tokenizer: Tokenizer | None,
    *,
    plan: Plan | None = None,
    name: str,
    store: str = "keep",
    dense: str = "keep",
) -> GgufProgram:
    """The program that writes `checkpoint`, with `plan` applied to it if given, as one GGUF file.

    `store`: "keep" leaves expert weights in their format, "mxfp4" converts those that are not MXFP4. `dense`:
    "q8_0" converts attention, embedding and unembedding matrices, as llama-quantize's MXFP4_MOE does.

    Raises UsageError for an unknown format or a family that llama.cpp does not support, PlanMismatchError for
    a plan that does not fit, InvalidInputError for a model that llama.cpp would compute differently.
    """
    if store not in STORES:
        raise UsageError(f"`store` {store}: choose one of {', '.join(STORES)}")
    if dense not in DENSE:
        raise UsageError(f"`dense` {dense}: choose one of {', '.join(DENSE)}")
    described = model.described
    if described.gguf is None:
        raise UsageError(f"{checkpoint.path}: {model.model_type} models cannot be exported as GGUF")
    gguf = described.gguf()
    config = ModelConfig.of(model)
    if (problem := gguf.unsupported(model, config)) is not None:
        raise InvalidInputError(f"config.json: {problem}; this model cannot be exported to GGUF")
    layers, kept, top_k = _kept(checkpoint, model, plan, gguf)
    target = MXFP4 if store == "mxfp4" else model.expert_format
    metadata = _metadata(gguf, config, name, kept, top_k, target)
    if tokenizer is None:
        metadata.text("tokenizer.ggml.model", "none")
    else:
        add_tokenizer(metadata, tokenizer)
    tensors = tuple(_tensors(model, gguf, layers, target, dense))
    embedding = next(t for t in model.tensors if t.role is Role.EMBEDDING)
    return GgufProgram(
        header(metadata, [t.entry for t in tensors]),
        tensors,
        name,
        target,
        "Q8_0" if dense == "q8_0" else embedding.stored.dtype,
        kept,
        top_k,
        model.parameters(kept),
        tokenizer.pre_tokenizer if tokenizer else None,
        len(tokenizer.tokens) if tokenizer else 0,
        tokenizer is not None and tokenizer.chat_template is not None,
    )


def default_name(files: Folder) -> str:
    """The default model name for the checkpoint in `files`: the folder's name, or that of the hub's model."""
    if files.hub_model is not None:
        return files.hub_model[0].rpartition("/")[2]
    real = files.path.resolve()
    return real.parent.name if real.name == "original" else real.name


def _kept(
    checkpoint: Checkpoint, model: ModelSpec, plan: Plan | None, gguf: GgufArchitecture
) -> tuple[Sequence[Sequence[int]], int, int]:
    """The experts of every layer, how many they are, and how many of them are active."""
    if plan is None:
        return [range(model.experts)] * model.layers, model.experts, model.top_k
    plan.check_fits(model.model_type, model.experts, model.layers, str(checkpoint.path))
    kept = plan.uniform_experts
    if kept is None:
        counts = sorted({len(row) for row in plan.layers})
        raise PlanMismatchError(
            f"the plan keeps between {counts[0]} and {counts[-1]} experts per layer, but a GGUF file of the "
            f"architecture {gguf.architecture} has one number for all layers; keep the same number in every layer"
        )
    return plan.layers, kept, min(plan.top_k or model.top_k, kept)


def _metadata(
    gguf: GgufArchitecture, config: ModelConfig, name: str, experts: int, top_k: int, target: ExpertFormat
) -> Metadata:
    """The metadata of the model, without its tokenizer."""
    metadata = Metadata()
    metadata.text("general.architecture", gguf.architecture)
    metadata.text("general.type", "model")
    metadata.text("general.name", name)
    metadata.u32("general.file_type", FILE_TYPES[target])
    metadata.u32("general.quantization_version", QUANTIZATION_VERSION)
    for key, value in gguf.metadata(config, experts, top_k).items():
        if isinstance(value, str):
            metadata.text(key, value)
        elif isinstance(value, int):
            metadata.u32(key, value)
        else:
            metadata.f32(key, value)
    return metadata


def _tensors(
    model: ModelSpec,
    gguf: GgufArchitecture,
    layers: Sequence[Sequence[int]],
    target: ExpertFormat,
    dense: str,
) -> Iterator[GgufTensor]:
    weights = model.described.weights
    patterns = gguf.names(weights)
    names = {
        pattern.format(layer=layer): [n.format(layer=layer) for n in targets]
        for layer in range(model.layers)
        for pattern, targets in patterns.items()
    }
    for tensor in model.tensors:
        kept = layers[tensor.layer] if tensor.has_experts and tensor.layer is not None else None
        targets = names[tensor.name]
        for first, name in enumerate(targets):
            yield _tensor(tensor, name, kept, target, dense, first, len(targets))
    if not any(t.role is Role.UNEMBEDDING for t in model.tensors):  # tied: llama.cpp needs the matrix twice
        embedding = next(t for t in model.tensors if t.role is Role.EMBEDDING)
        yield _tensor(embedding, names[weights.unembedding][0], None, target, dense, 0, 1)


def _tensor(
    tensor: ModelTensor,
    name: str,
    kept: Sequence[int] | None,
    target: ExpertFormat,
    dense: str,
    first: int,
    step: int,
) -> GgufTensor:
    """The GGUF tensor of `tensor`, or of its rows first, first + step, ..."""
    slowest, *dims = tensor.shape if kept is None else (len(kept), *tensor.shape[1:])
    if tensor.role is Role.EXPERT_WEIGHT:
        assert kept is not None
        shape: tuple[int, ...] = (slowest, dims[0] // step, dims[1])
        kind, parts = _expert_weight(tensor, kept, target, first, step)
    else:
        shape = (slowest, *dims[:-1], dims[-1] // step) if dims else (slowest,)
        refs = [tensor.stored] if kept is None else [tensor.stored.rows(e, 1) for e in kept]
        spans = list(coalesce(map(_span, refs)))
        dtype = tensor.stored.dtype
        if len(shape) == 1 or tensor.role in _FLOAT32:
            kind = BY_NAME["F32"]
            parts = tuple(Widen(s, dtype, first, step) for s in spans)
        elif dense == "q8_0":
            kind = BY_NAME["Q8_0"]
            parts = tuple(_quantise_q8(tensor.stored, span) for span in spans)
        else:
            kind = BY_NAME[dtype]
            parts = tuple(map(Copy, spans))
    nbytes = sum(p.nbytes for p in parts)
    if gap := padding(nbytes):
        parts += (Pad(gap),)
    return GgufTensor(TensorEntry(name, kind, shape, nbytes), parts)


def _expert_weight(
    tensor: ModelTensor, kept: Sequence[int], target: ExpertFormat, first: int, step: int
) -> tuple[BlockType, tuple[GgufPart, ...]]:
    stored, scales, source = tensor.stored, tensor.scales, tensor.format
    assert source is not None
    _, rows, columns = tensor.shape
    values = [_span(stored.rows(e, 1)) for e in kept]
    if scales is not None:
        pairs = zip(values, (_span(scales.rows(e, 1)) for e in kept), strict=True)
        return BY_NAME["MXFP4"], tuple(Pack(b, s, rows, columns, first, step) for b, s in pairs)
    if not target.packed:
        return BY_NAME[target.dtype], tuple(Transpose(v, rows, columns, first, step, source) for v in values)
    if not target.fits_columns(columns):
        raise UsageError(
            f"`store` mxfp4: tensor {tensor.name!r} has {columns} columns, not a multiple of {BLOCK_VALUES}"
        )
    return BY_NAME["MXFP4"], tuple(
        Quantise(v, rows, columns, first, step, stored.name, source) for v in values
    )


def _quantise_q8(stored: TensorRef, span: Span) -> QuantiseQ8:
    source, columns = format_of_dtype(stored.dtype), stored.shape[-1]
    assert source is not None
    if columns % q8_0.BLOCK_VALUES:
        raise UsageError(
            f"`dense` q8_0: tensor {stored.name!r} has {columns} columns, not a multiple of {q8_0.BLOCK_VALUES}"
        )
    return QuantiseQ8(span, columns, stored.name, source)


def _span(ref: TensorRef) -> Span:
    return Span(ref.shard, ref.offset, ref.nbytes)
