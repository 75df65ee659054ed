"""Tensors in the forms that the extension reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_surgery.errors import UsageError
from moe_surgery.kernels.weights import DenseWeight, Weight

__all__ = ["BF16", "F32", "Plain", "in_float32", "matrix_of", "plain_bf16", "projection_of"]

BF16 = torch.bfloat16
F32 = torch.float32


class Plain(Exception):
    """The weight is of a kind that only plain PyTorch multiplies."""


def in_float32(x: Tensor) -> Tensor:
    """`x` in float32, contiguous."""
    return (x if x.dtype == F32 else x.float()).contiguous()


def plain_bf16(tensor: Tensor) -> bool:
    """Whether it is BF16 in memory of the CPU with a contiguous last axis."""
    return tensor.dtype == BF16 and tensor.is_cpu and tensor.stride(-1) == 1


def projection_of(weight: Tensor, bias: Tensor | None) -> tuple[int, int, int, int, int]:
    """`ProjectionTuple` of the extension, for BF16 tensors."""
    rows, columns = weight.shape
    return weight.data_ptr(), 2 * weight.stride(0), rows, columns, 0 if bias is None else bias.data_ptr()


def matrix_of(native: Any, what: str, weight: Weight, bias: Tensor) -> Any:
    """`ExpertMatrix` of the extension. Raises Plain, or UsageError for shapes that do not agree."""
    if not (plain_bf16(bias) and bias.is_contiguous()):
        raise Plain
    if isinstance(weight, DenseWeight):
        values = weight.values
        if not plain_bf16(values):
            raise Plain
        experts, columns, rows = values.shape
        _check_bias(what, bias, experts, rows)
        strides = 2 * values.stride(0), 2 * values.stride(1)
        return native.dense_matrix(values.data_ptr(), *strides, experts, rows, columns, bias.data_ptr())
    blocks, scales = weight.blocks, weight.scales
    if not (blocks.is_cpu and scales.is_cpu):
        raise UsageError(f"native backend: {what} is on {blocks.device}, not on the CPU")
    experts, rows, groups, width = blocks.shape
    if width != 16 or scales.shape != (experts, rows, groups) or blocks.dtype != torch.uint8:
        raise UsageError(
            f"native backend: {what} has blocks {tuple(blocks.shape)} and scales {tuple(scales.shape)}, "
            "needed [experts, rows, groups, 16] and [experts, rows, groups] of bytes"
        )
    if blocks.stride()[2:] != (16, 1) or scales.stride(2) != 1 or scales.dtype != torch.uint8:
        raise Plain
    _check_bias(what, bias, experts, rows)
    return native.packed_matrix(
        blocks.data_ptr(),
        blocks.stride(0),
        blocks.stride(1),
        scales.data_ptr(),
        scales.stride(0),
        scales.stride(1),
        experts,
        rows,
        32 * groups,
        bias.data_ptr(),
    )


def _check_bias(what: str, bias: Tensor, experts: int, rows: int) -> None:
    if bias.shape != (experts, rows):
        raise UsageError(
            f"native backend: {what} has a bias of {tuple(bias.shape)}, needed ({experts}, {rows})"
        )
