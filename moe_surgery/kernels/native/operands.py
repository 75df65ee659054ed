"""Tensors as the extension reads them."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moe_surgery.errors import UsageError
from moe_surgery.kernels.q8_0 import Matrix, Q8Matrix
from moe_surgery.kernels.weights import DenseWeight, Weight

__all__ = [
    "BF16",
    "F32",
    "UnsupportedWeight",
    "check_readable",
    "in_float32",
    "log_fallback",
    "matrix_of",
    "projection_of",
    "values_of",
]

log = logging.getLogger("moe_surgery")

BF16 = torch.bfloat16
F32 = torch.float32
# The dtypes of weights that the kernels read, and the extension's numbers for them.
DTYPES = {BF16: 0, torch.float16: 1, F32: 2}
Q8_0 = 3


class UnsupportedWeight(Exception):
    """The kernels do not read this weight; the message says why. Plain PyTorch multiplies it."""


@lru_cache(maxsize=64)
def log_fallback(reason: str) -> None:
    """Warn, once per process and reason, that plain PyTorch is used."""
    log.warning(
        "native backend: %s; its kernels read bfloat16, float16, float32, MXFP4 and Q8_0 with a contiguous last axis. "
        "Plain PyTorch computes this: slower, and a token's result may depend on the rest of the batch "
        "(`backend` reference-invariant avoids that)",
        reason,
    )


def in_float32(x: Tensor) -> Tensor:
    """`x` in float32, contiguous."""
    return (x if x.dtype == F32 else x.float()).contiguous()


def check_readable(what: str, tensor: Matrix | None) -> None:
    """Raise UnsupportedWeight unless the kernels read `tensor` (None for no bias), UsageError where it is not on
    the CPU."""
    if tensor is None:
        return
    if tensor.device.type != "cpu":
        raise UsageError(f"native backend: {what} is on {tensor.device}, not on the CPU")
    if isinstance(tensor, Q8Matrix):
        return
    if tensor.dtype not in DTYPES:
        raise UnsupportedWeight(f"{what} is {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.stride(-1) != 1:
        raise UnsupportedWeight(f"{what} has strides {tensor.stride()}")


def values_of(tensor: Tensor | None) -> tuple[int, int]:
    """`ValuesTuple` of the extension, for a tensor that `check_readable` accepts."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), DTYPES[tensor.dtype])


def projection_of(
    weight: Matrix, bias: Tensor | None
) -> tuple[tuple[int, int], int, int, int, tuple[int, int]]:
    """`ProjectionTuple` of the extension, for tensors that `check_readable` accepts."""
    rows, columns = weight.shape
    if isinstance(weight, Q8Matrix):
        return (weight.data_ptr(), Q8_0), weight.data.stride(0), rows, columns, values_of(bias)
    return values_of(weight), weight.itemsize * weight.stride(0), rows, columns, values_of(bias)


def matrix_of(native: Any, what: str, weight: Weight, bias: Tensor) -> Any:
    """`ExpertMatrix` of the extension. Raises UnsupportedWeight, or UsageError for shapes that do not agree."""
    check_readable(f"the bias of {what}", bias)
    if not bias.is_contiguous():
        raise UnsupportedWeight(f"the bias of {what} has strides {bias.stride()}")
    if isinstance(weight, DenseWeight):
        values = weight.values
        check_readable(what, values)
        experts, columns, rows = values.shape
        _check_bias(what, bias, experts, rows)
        strides = (values.itemsize * stride for stride in values.stride()[:2])
        return native.dense_matrix(values_of(values), *strides, experts, rows, columns, values_of(bias))
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
        raise UnsupportedWeight(
            f"{what} has blocks of strides {blocks.stride()} and scales of {scales.stride()}, {scales.dtype}"
        )
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
        values_of(bias),
    )


def _check_bias(what: str, bias: Tensor, experts: int, rows: int) -> None:
    if bias.shape != (experts, rows):
        raise UsageError(
            f"native backend: {what} has a bias of {tuple(bias.shape)}, needed ({experts}, {rows})"
        )
