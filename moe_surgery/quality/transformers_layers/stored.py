"""Stored tensors as dense ones: FP8, INT4 (compressed-tensors) and MXFP4 weights times their scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import torch
from torch import Tensor

from moe_surgery.checkpoint.checkpoint import TensorRef
from moe_surgery.errors import InvalidInputError
from moe_surgery.families.catalog_config import holders
from moe_surgery.families.stored_weights import packed_bits
from moe_surgery.formats import mxfp4

__all__ = ["DenseTensor", "block_size", "dense_tensors"]

_FLOATS: Final = ("BF16", "F16", "F32", "F64")
_INTEGERS: Final = ("I64", "I32", "BOOL", "U8", "I16")
_FLOAT8: Final = ("F8_E4M3", "F8_E5M2")
_EXPONENTS: Final = ("U8", "F8_E8M0")
# Ends of names under which integers are codes of weights.
_CODES: Final = (".weight", "weight_packed", "_blocks", "qweight", "qzeros", "trellis")
# Tensors that say how activations are quantised: computing in floating point does not need them.
_ACTIVATIONS: Final = ("input_scale", "input_global_scale", "input_amax", "weight_shape")


@dataclass(frozen=True, slots=True)
class DenseTensor:
    """A tensor `name` of the model and the names of those it is stored in, by what each is.

    `kind` is "plain", "fp8", "int4" or "mxfp4"; `parts` has "weight" and, except for plain ones, "scale" (INT4 also
    "zero_point", where it is not symmetric).
    """

    name: str
    kind: str
    parts: Mapping[str, str]
    block: tuple[int, int] = (128, 128)

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The values of `tensors`, the bytes of `parts`; scaled ones in `dtype`, plain ones as stored."""
        weight = tensors["weight"]
        if self.kind == "plain":
            return weight
        scale = tensors["scale"]
        if self.kind == "fp8":
            return _scaled(weight, scale, self.block).to(dtype)
        if self.kind == "int4":
            return _unpacked(weight, scale, tensors.get("zero_point")).to(dtype)
        return _from_mxfp4(weight, scale).to(dtype)


@dataclass(slots=True)
class _Found:
    refs: Mapping[str, TensorRef]
    used: set[str] = field(default_factory=set)

    def weight(self, name: str, kind: str, ref: str, *scales: str) -> DenseTensor | None:
        """The weight whose codes are `ref`, with the first of `scales` that there is; None without one."""
        scale = next((s for s in scales if s in self.refs), None)
        if scale is None:
            return None
        parts = {"weight": ref, "scale": scale}
        self.used |= set(parts.values())
        return DenseTensor(name, kind, parts)


def block_size(config: Mapping[str, object]) -> tuple[int, int]:
    """Rows and columns that share a scale in FP8, [128, 128] unless config.json says otherwise."""
    for _, holder in holders(config):
        quantization = holder.get("quantization_config")
        size = quantization.get("weight_block_size") if isinstance(quantization, Mapping) else None
        if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
            return size[0], size[1]
    return 128, 128


def dense_tensors(
    refs: Mapping[str, TensorRef], config: Mapping[str, object], where: str
) -> list[DenseTensor]:
    """What the stored tensors `refs`, by name, are in the model of `config`.

    Raises InvalidInputError, naming the tensor, for a quantisation that is not decoded here.
    """
    found = _Found(refs)
    result = [dense for name, ref in refs.items() if (dense := _dense(found, name, ref, config)) is not None]
    for name, ref in refs.items():
        if name in found.used or name.endswith(_ACTIVATIONS):
            continue
        if ref.dtype not in (*_FLOATS, *_INTEGERS) or (ref.dtype in _INTEGERS and name.endswith(_CODES)):
            raise InvalidInputError(
                f"{where}: tensor '{name}' is stored as {ref.dtype} in a quantisation that is not decoded here; FP8, "
                "INT4 (compressed-tensors) and MXFP4 are, and so is every dense checkpoint"
            )
        result.append(DenseTensor(name, "plain", {"weight": name}))
    return result


def _dense(found: _Found, name: str, ref: TensorRef, config: Mapping[str, object]) -> DenseTensor | None:
    """The quantised weight whose codes are `name`, None for any other tensor."""
    if name.endswith("_blocks"):
        stem = name.removesuffix("_blocks")
        return found.weight(stem, "mxfp4", name, f"{stem}_scales")
    if name.endswith("weight_packed") and name.replace("_packed", "_g_idx") not in found.refs:
        stem = name.removesuffix("_packed")
        if ref.dtype == "U8":
            scale = found.refs.get(f"{stem}_scale")
            exponents = scale is not None and scale.dtype in _EXPONENTS
            return found.weight(stem, "mxfp4", name, f"{stem}_scale") if exponents else None
        if ref.dtype != "I32" or packed_bits(config) != 4:
            return None
        dense = found.weight(stem, "int4", name, f"{stem}_scale")
        if dense is None or f"{stem}_zero_point" not in found.refs:
            return dense
        found.used.add(f"{stem}_zero_point")
        return replace(dense, parts={**dense.parts, "zero_point": f"{stem}_zero_point"})
    if ref.dtype in _FLOAT8:
        scales = f"{name}_scale_inv", f"{name}_scale", _sibling(name, "scale")
        dense = found.weight(name, "fp8", name, *scales)
        return dense and replace(dense, block=block_size(config))
    if ref.dtype == "I8":
        return found.weight(name, "mxfp4", name, _sibling(name, "scale"))
    return None


def _sibling(name: str, leaf: str) -> str:
    return f"{name.rpartition('.')[0]}.{leaf}"


def _exponents(scale: Tensor) -> Tensor:
    """Scales as float32; bytes are exponents of two, biased by 127."""
    return torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()


def _scaled(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """FP8 [..., rows, columns] times a scale for all, one a row, or one a block of rows and columns; float32."""
    values, scale = weight.float(), _exponents(scale)
    if scale.numel() == 1:
        return values * scale.reshape(())
    if scale.ndim < values.ndim:  # one a row, or one an expert
        scale = scale.reshape(*scale.shape, *[1] * (values.ndim - scale.ndim))
    for axis, size in ((-2, block[0]), (-1, block[1])):
        if scale.shape[axis] not in (1, values.shape[axis]):
            scale = scale.repeat_interleave(size, axis).narrow(axis, 0, values.shape[axis])
    return values.mul_(scale)


def _unpacked(packed: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """INT4 packed along columns, eight an int32, lowest bits first, offset by 8; times a scale a group of columns."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    codes = ((packed[..., None] >> shifts) & 15).flatten(-2)
    groups = codes.reshape(*codes.shape[:-1], scale.shape[-1], -1).float()
    offset: Tensor | float = 8.0
    if zero_point is not None:  # packed along rows
        points = ((zero_point[..., None, :] >> shifts[:, None]) & 15).flatten(-3, -2)
        offset = points[..., : codes.shape[-2], :, None].float()
    return ((groups - offset) * scale.float()[..., None]).flatten(-2)


def _from_mxfp4(blocks: Tensor, scale: Tensor) -> Tensor:
    """MXFP4 codes [..., columns / 2] or gpt-oss's blocks [..., columns / 32, 16], whose matrix is transposed."""
    published = blocks.ndim == scale.ndim + 1
    exponents = scale.view(torch.uint8).cpu().reshape(-1, scale.shape[-1])
    codes = blocks.view(torch.uint8).cpu().reshape(*exponents.shape, mxfp4.BLOCK_BYTES)
    bits = mxfp4.decode(codes.numpy(), exponents.numpy())
    values = torch.from_numpy(bits).view(torch.bfloat16).view(*scale.shape[:-1], -1)
    return values.transpose(-1, -2).to(blocks.device) if published else values.to(blocks.device)
