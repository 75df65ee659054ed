"""The native backend: checks tensors and passes them to the extension as addresses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from moe_surgery.errors import UsageError
from moe_surgery.formats.native import native_module, native_reason
from moe_surgery.kernels.interface import (
    SHORT_STEP,
    DecoderModel,
    DecoderShape,
    DecodeStep,
    FusedLayers,
    KVCache,
    MeasuredExperts,
)
from moe_surgery.kernels.native.operands import (
    BF16,
    F32,
    UnsupportedWeight,
    check_readable,
    in_float32,
    log_fallback,
    matrix_of,
    projection_of,
    values_of,
)
from moe_surgery.kernels.native.stack import NativeStack
from moe_surgery.kernels.q8_0 import Matrix
from moe_surgery.kernels.reference import ReferenceBackend
from moe_surgery.kernels.weights import ExpertWeights, Layer

__all__ = ["THREADS_VARIABLE", "NativeBackend", "availability"]

THREADS_VARIABLE = "MOE_SURGERY_THREADS"
MAX_THREADS = 1024


def availability() -> str | None:
    """Why the native backend cannot run here, or None."""
    return native_reason()


class NativeBackend:
    """See `moe_surgery.kernels.interface.Backend`. For tensors on the CPU.

    Sums are float32 in any dtype of x, over weights that are never converted in memory: BF16, F16, F32, MXFP4 and Q8_0.
    A product with MXFP4 or Q8_0 rounds its activations to 16-bit integers, 32 columns sharing a scale: an error of at
    most 1.6e-5 of the largest of the 32, so results are not those of float32 arithmetic (the reference
    backend's are). A token's result does not depend on the other tokens of a call, on the number of threads
    or on the instruction set, bit for bit. Weights of other dtypes, or not contiguous in their last axis, are
    computed by plain PyTorch without that guarantee, with a warning to the logger `moe_surgery`.

    For steps of at least 32 tokens (`for_tokens`) attention adds the terms of its scores in another order. The
    instruction set amx, and avx512bf16 if asked for, then multiplies BF16 and Q8_0 weights, and experts in MXFP4 or
    BF16, in tiles: activations, and weights of Q8_0, are sums of two BF16 values (an error of at most 2^-17 of each),
    sums are float32. With amx, activations of products with MXFP4 are 16-bit integers there too, up to 512 columns
    sharing a scale: an error of at most 1.6e-5 of the largest of them. The bits then differ from those of shorter
    steps, and between sets with tiles and without; that a token's result does not depend on the others holds as before.

    `isa` is one of `instruction_sets()`, by default the best. `threads` defaults to the environment variable
    MOE_SURGERY_THREADS, else to torch's number. Threads start once per process, and again in a forked child.
    Raises UsageError where the extension or `isa` is not available or `threads` is out of range.
    """

    name = "native"
    dtype = torch.float32  # sums are float32 in any case
    stores_scores = False
    reads_q8_0 = True

    def __init__(self, isa: str = "", threads: int | None = None) -> None:
        module = native_module()
        if module is None:
            raise UsageError(f"`backend` native: {availability()}; choose `backend` reference")
        self._native: Any = module
        self._reference = ReferenceBackend()
        try:
            threads = _thread_count() if threads is None else threads
            self._engines = [module.Engine(isa, threads, long_step) for long_step in (False, True)]
        except ValueError as error:
            raise UsageError(f"`backend` native: {error}") from None
        self._engine: Any = self._engines[False]

    def for_tokens(self, tokens: int) -> NativeBackend:
        long_step = tokens > SHORT_STEP
        if self._engines[long_step] is self._engine:
            return self
        other = copy(self)
        other._engine = self._engines[long_step]
        return other

    @property
    def isa(self) -> str:
        return str(self._engine.isa)

    @property
    def threads(self) -> int:
        return int(self._engine.threads)

    @property
    def has_tiles(self) -> bool:
        """Whether the instruction set multiplies the tokens of long steps in tiles."""
        return bool(self._engines[True].tiled)

    @staticmethod
    def instruction_sets() -> list[str]:
        """Instruction sets of this machine, best first; none without the extension."""
        module = native_module()
        return [] if module is None else list(module.cpu_instruction_sets())

    def route(self, x: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        _check_cpu("x", x)
        try:
            check_readable("the router's weight", weight)
            check_readable("the router's bias", bias)
        except UnsupportedWeight as reason:
            log_fallback(str(reason))
            return self._reference.route(x, weight, bias, top_k)
        rows, columns = weight.shape
        _check_shape("x", x, (None, columns))
        _check_shape("the router's bias", bias, (rows,))
        if not 1 <= top_k <= rows:
            raise UsageError(f"native backend: top_k {top_k} of {rows} experts")
        x_fp32, tokens = in_float32(x), len(x)
        ids = torch.empty((tokens, top_k), dtype=torch.int64)
        weights = torch.empty((tokens, top_k))
        logits = torch.empty((tokens, rows))
        router = (*projection_of(weight, bias), logits.data_ptr())
        self._engine.route(x_fp32.data_ptr(), tokens, router, top_k, ids.data_ptr(), weights.data_ptr())
        return ids, _as(weights, x)

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, expert_weights: ExpertWeights) -> Tensor:
        try:
            arguments, y, _operands = self._expert_arguments(x, ids, weights, expert_weights)
        except UnsupportedWeight as reason:
            log_fallback(str(reason))
            return self._reference.experts(x, ids, weights, expert_weights)
        if not ids.numel():
            return torch.zeros_like(x)
        self._engine.experts(*arguments)
        return _as(y, x)

    def measured_experts(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        expert_weights: ExpertWeights,
        groups: Tensor,
        sums: Tensor,
    ) -> MeasuredExperts | None:
        if expert_weights.expert_map is not None:
            raise UsageError("native backend: experts with an `expert_map` cannot be measured")
        try:
            arguments, y, _operands = self._expert_arguments(x, ids, weights, expert_weights)
        except UnsupportedWeight:
            return None
        if not ids.numel():
            return None
        experts, hidden = len(expert_weights.down_bias), expert_weights.down.rows
        _check_shape("groups", groups, (len(x),))
        _check_shape("sums", sums, (None, experts, hidden))
        if sums.dtype != torch.float64 or not sums.is_contiguous():
            raise UsageError(f"native backend: sums are {sums.dtype}, needed contiguous {torch.float64}")
        groups = groups.long().contiguous()
        if int(groups.min()) < 0 or int(groups.max()) >= len(sums):
            raise UsageError(f"native backend: a group is not below {len(sums)}")
        norms = torch.empty(ids.shape, dtype=torch.float64)
        least, largest = torch.empty(ids.shape), torch.empty(ids.shape)
        measures = (t.data_ptr() for t in (groups, norms, least, largest, sums))
        self._engine.measured_experts(*arguments, *measures)
        return MeasuredExperts(_as(y, x), norms, least, largest)

    def _expert_arguments(
        self, x: Tensor, ids: Tensor, weights: Tensor, e: ExpertWeights
    ) -> tuple[tuple[object, ...], Tensor, object]:
        """The engine's arguments, the output float32 [tokens, hidden], and what must live during the call. Raises
        UnsupportedWeight."""
        _check_cpu("x", x)
        gate_up = matrix_of(self._native, "gate_up", e.gate_up, e.gate_up_bias)
        down = matrix_of(self._native, "down", e.down, e.down_bias)
        hidden, intermediate = e.gate_up.columns, e.down.columns
        if (e.gate_up.rows, e.down.rows) != (2 * intermediate, hidden):
            raise UsageError(
                f"native backend: gate_up is {hidden} -> {e.gate_up.rows}, down {intermediate} -> {e.down.rows}"
            )
        _check_shape("x", x, (None, hidden))
        _check_shape("ids", ids, (len(x), None))
        _check_shape("weights", weights, tuple(ids.shape))
        stored = ids.long() if e.expert_map is None else e.expert_map[ids]
        stored, x_fp32, routing_weights = stored.contiguous(), in_float32(x), in_float32(weights)
        y = torch.empty_like(x_fp32)
        addresses = (t.data_ptr() for t in (x_fp32, stored, routing_weights))
        arguments = (*addresses, *ids.shape, gate_up, down, e.limit, e.alpha, y.data_ptr())
        return arguments, y, (x_fp32, stored, routing_weights)

    def linear(self, x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
        return self.multi_linear(x, [(weight, bias)])[0]

    def multi_linear(self, x: Tensor, layers: Sequence[tuple[Matrix, Tensor | None]]) -> list[Tensor]:
        _check_cpu("x", x)
        try:
            for weight, bias in layers:
                check_readable("a weight", weight)
                check_readable("a bias", bias)
        except UnsupportedWeight as reason:
            log_fallback(str(reason))
            return self._reference.multi_linear(x, layers)
        columns = x.shape[-1]
        for weight, bias in layers:
            _check_shape("weight", weight, (None, columns))
            if bias is not None:
                _check_shape("bias", bias, (weight.shape[0],))
        x_fp32 = in_float32(x)
        outputs = [torch.empty((*x.shape[:-1], len(weight))) for weight, _ in layers]
        products = [(*projection_of(w, b), y.data_ptr()) for (w, b), y in zip(layers, outputs, strict=True)]
        self._engine.products(x_fp32.data_ptr(), x_fp32.numel() // columns, products)
        return [_as(y, x) for y in outputs]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        _check_cpu("x", x)
        columns = x.shape[-1]
        try:
            check_readable("a norm's weight", weight)
        except UnsupportedWeight as reason:
            log_fallback(str(reason))
            return self._reference.rms_norm(x, weight, eps)
        _check_shape("the norm's weight", weight, (columns,))
        x_fp32 = in_float32(x)
        y = torch.empty_like(x_fp32)
        self._engine.rms_norm(
            x_fp32.data_ptr(), x_fp32.numel() // columns, columns, values_of(weight), eps, y.data_ptr()
        )
        return _as(y, x)

    def rope_cos_sin(self, positions: Tensor, frequencies: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        _check_cpu("positions", positions)
        positions, frequencies = positions.long().contiguous(), in_float32(frequencies)
        cos, sin = (torch.empty((*positions.shape, len(frequencies))) for _ in range(2))
        self._native.rope_cos_sin(
            positions.data_ptr(),
            positions.numel(),
            frequencies.data_ptr(),
            len(frequencies),
            scale,
            cos.data_ptr(),
            sin.data_ptr(),
        )
        return cos, sin

    def apply_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        _check_cpu("x", x)
        x_fp32 = x if x.dtype == F32 and x.stride(-1) == 1 else in_float32(x)
        cos, sin = in_float32(cos), in_float32(sin)
        if x.ndim > 4 or not _broadcasts(x, cos) or not _broadcasts(x, sin):
            raise UsageError(
                f"native backend: x {tuple(x.shape)} cannot be rotated by angles {tuple(cos.shape)} and "
                f"{tuple(sin.shape)}"
            )
        y = torch.empty(tuple(x.shape))
        angles = (cos.data_ptr(), _broadcast_strides(cos), sin.data_ptr(), _broadcast_strides(sin))
        self._native.apply_rope(x_fp32.data_ptr(), x_fp32.stride(), *angles, y.shape, y.data_ptr())
        return _as(y, x)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor,
        queries: Tensor,
        keys: Tensor,
        window: int | None,
    ) -> Tensor:
        for name, tensor in {"q": q, "k": k, "v": v}.items():
            _check_cpu(name, tensor)
        batch, heads, columns, head_dim = q.shape
        kv_heads, slots = k.shape[1], k.shape[2]
        if heads % kv_heads:
            raise UsageError(f"native backend: {heads} heads do not share {kv_heads} key-value heads")
        _check_shape("k", k, (batch, kv_heads, slots, head_dim))
        _check_shape("v", v, (batch, kv_heads, slots, head_dim))
        _check_shape("sinks", sinks, (heads,))
        _check_shape("queries", queries, (batch, columns))
        _check_shape("keys", keys, (batch, slots))
        q_fp32 = in_float32(q)
        if k.dtype not in (F32, BF16) or v.dtype != k.dtype:
            k, v = k.float(), v.float()
        k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (k, v))
        queries, keys, sinks = queries.contiguous(), keys.contiguous(), in_float32(sinks)
        out = torch.empty((batch, columns, heads * head_dim))
        itemsize = k.element_size()
        self._engine.attention(
            q_fp32.data_ptr(),
            k.data_ptr(),
            tuple(s * itemsize for s in k.stride()[:3]),
            v.data_ptr(),
            tuple(s * itemsize for s in v.stride()[:3]),
            k.dtype == F32,
            sinks.data_ptr(),
            queries.data_ptr(),
            keys.data_ptr(),
            (batch, heads, kv_heads, columns, slots, head_dim, window or 0),
            out.data_ptr(),
        )
        return _as(out, q)

    def fuse_layers(self, layers: Sequence[Layer], shape: DecoderShape) -> FusedLayers | None:
        try:
            return NativeStack(self._native, self._engine, layers, shape)
        except UnsupportedWeight:
            return None

    def prepare_layer(self, layer: Layer) -> Layer:
        return layer

    def decode_step(self, model: DecoderModel, cache: KVCache) -> DecodeStep | None:
        return None


def _thread_count() -> int:
    value = os.environ.get(THREADS_VARIABLE, "").strip()
    if not value:
        return torch.get_num_threads()
    if not value.isdecimal() or not 1 <= int(value) <= MAX_THREADS:
        raise UsageError(f"{THREADS_VARIABLE}={value}: must be a number from 1 to {MAX_THREADS}")
    return int(value)


def _as(y: Tensor, x: Tensor) -> Tensor:
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _broadcasts(x: Tensor, angles: Tensor) -> bool:
    """Whether `angles` broadcast to [..., head_dim / 2] of x."""
    shape = zip(angles.shape[:-1], x.shape[:-1], strict=False)
    return (
        angles.ndim == x.ndim
        and 2 * angles.shape[-1] == x.shape[-1]
        and all(n in (1, expected) for n, expected in shape)
    )


def _broadcast_strides(angles: Tensor) -> list[int]:
    """Strides, 0 along axes of length 1."""
    return [0 if n == 1 else s for n, s in zip(angles.shape, angles.stride(), strict=True)]


def _check_cpu(what: str, tensor: Tensor) -> None:
    if not tensor.is_cpu:
        raise UsageError(f"native backend: {what} is on {tensor.device}, not on the CPU")


def _check_shape(what: str, tensor: Matrix, expected: tuple[int | None, ...]) -> None:
    """Raise UsageError unless `tensor` has that shape (None is any length)."""
    shape = tensor.shape
    if len(shape) == len(expected) and all(w is None or w == s for s, w in zip(shape, expected, strict=True)):
        return
    raise UsageError(f"native backend: {what} has shape {tuple(shape)}, needed {expected}")
