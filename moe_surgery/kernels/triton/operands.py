"""Expert weights as the kernels take them: pointers, strides and what is known about the scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from moe_surgery.errors import UsageError
from moe_surgery.kernels.weights import DenseWeight, Weight

__all__ = ["Operand", "operand"]

# One multiplication decodes scales up to this; `dequant.dequantize_mxfp4` says why.
MAX_ONE_STEP_SCALE = 128

_any_e8m0: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True, slots=True)
class Operand:
    """One linear layer of all stored experts, with its bias.

    data: uint8 [experts, rows, columns/32, 16] or floating [experts, columns, rows]; scales: uint8
    [experts, rows, columns/32], or `data` itself where there are none; bias [experts, rows].
    """

    data: Tensor
    scales: Tensor
    bias: Tensor
    rows: int
    columns: int
    mxfp4: bool
    any_e8m0: bool

    def arguments(self) -> dict[str, Any]:
        """The kernel arguments that every use of a weight has."""
        return {
            "data": self.data,
            "scales": self.scales,
            "bias": self.bias,
            "data_stride": self.data.stride(0),
            "scales_stride": self.scales.stride(0),
            "bias_stride": self.bias.stride(0),
            "MXFP4": self.mxfp4,
            "ANY_E8M0": self.any_e8m0,
        }


def operand(weight: Weight, bias: Tensor, what: str) -> Operand:
    """`weight` checked: raises UsageError, naming `what`, for a layout that the kernels do not read.

    The first time a scale tensor on a device is used its largest value is read, which waits for the device:
    run a step before capturing one.
    """
    rows, columns = weight.rows, weight.columns
    if columns % 32:
        raise UsageError(f"triton backend: {what} has {columns} columns; a multiple of 32 is needed")
    if rows * columns >= 1 << 31:
        raise UsageError(
            f"triton backend: {what} has {rows} x {columns} values an expert; below 2^31 is needed"
        )
    if isinstance(weight, DenseWeight):
        data = scales = weight.values
        if not data.dtype.is_floating_point or data.dtype.itemsize > 4:
            raise UsageError(f"triton backend: {what} is {data.dtype}; BF16, F16 or F32 is needed")
    else:
        data, scales = weight.blocks, weight.scales
        if data.dtype != torch.uint8 or scales.dtype != torch.uint8:
            raise UsageError(f"triton backend: {what} is {data.dtype} with {scales.dtype} scales, not uint8")
        if tuple(scales.shape) != tuple(data.shape[:3]):
            raise UsageError(
                f"triton backend: {what}: {tuple(scales.shape)} scales, {tuple(data.shape)} blocks"
            )
    if tuple(bias.shape) != (data.shape[0], rows):
        raise UsageError(f"triton backend: {what}: bias {tuple(bias.shape)}, needed {(data.shape[0], rows)}")
    for tensor in (data, scales, bias):
        if not tensor[0].is_contiguous():
            raise UsageError(f"triton backend: {what}: an expert's values are not contiguous")
    mxfp4 = not isinstance(weight, DenseWeight)
    return Operand(data, scales, bias, rows, columns, mxfp4, mxfp4 and _needs_any_e8m0(scales))


def _needs_any_e8m0(scales: Tensor) -> bool:
    if scales.device.type == "meta":
        return False
    if scales not in _any_e8m0:
        _any_e8m0[scales] = bool(scales.numel()) and int(scales.max()) > MAX_ONE_STEP_SCALE
    known: bool = _any_e8m0[scales]
    return known
