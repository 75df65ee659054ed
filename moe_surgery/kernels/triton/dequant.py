"""Shared device functions: MXFP4 dequantisation, the product, the activation, and split-K reductions."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,import-untyped,import-not-found"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["dequantize_mxfp4", "dot", "reduce_split_k", "stored_expert", "swiglu"]


@triton.jit
def dequantize_mxfp4(bytes_, scales, ANY_E8M0: tl.constexpr):
    """MXFP4 bytes and their E8M0 scales (broadcastable) to two float32 tensors: low and high nibbles.

    Sign and magnitude of a nibble move to a float32's sign, low exponent bits and first mantissa
    bit; that is the value times 2^-126, E2M1's subnormal 0.5 included, so one multiplication by
    2^(scale - 1) is exact. It needs scale <= 128, which every trained checkpoint satisfies; ANY_E8M0
    multiplies by the excess in a second step, exact for all 256 scales up to overflow to infinity (which
    is how the CPU kernels define scales from 253 on).
    """
    byte = bytes_.to(tl.int32)
    scale = scales.to(tl.int32)
    # 0x81C00000 as a negative int32: bit 31 and bits 24..22.
    low = ((byte << 28) | (byte << 22)) & -0x7E400000
    high = (((byte << 24) & -0x80000000) | ((byte << 18) & 0x01C00000)).to(tl.int32)
    if ANY_E8M0:
        first = ((tl.minimum(scale, 128) + 126) << 23).to(tl.float32, bitcast=True)
        second = ((tl.maximum(scale, 128) - 1) << 23).to(tl.float32, bitcast=True)
        even = low.to(tl.float32, bitcast=True) * first * second
        odd = high.to(tl.float32, bitcast=True) * first * second
    else:
        factor = ((scale + 126) << 23).to(tl.float32, bitcast=True)
        even = low.to(tl.float32, bitcast=True) * factor
        odd = high.to(tl.float32, bitcast=True) * factor
    return even, odd


@triton.jit
def dot(weights, x, acc, UPCAST_FP32: tl.constexpr):
    """acc [M, N] + weights [M, K] @ x [K, N], accumulated in float32.

    On BF16 inputs the tensor cores multiply BF16 (MXFP4 and BF16 weights are exact in it). UPCAST_FP32 keeps
    float32: for other inputs, and in the interpreter, whose BF16 products are wrong.
    """
    if UPCAST_FP32:
        return tl.dot(weights.to(tl.float32), x.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(weights.to(tl.bfloat16), x.to(tl.bfloat16), acc)


@triton.jit
def swiglu(gate, up, limit, alpha):
    """The clamped SwiGLU in float32; NaN stays NaN, as torch.clamp leaves it."""
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return (up + 1) * (gate / (1 + tl.exp(-alpha * gate)))


@triton.jit
def stored_expert(expert, expert_map, HAS_EXPERT_MAP: tl.constexpr):
    """The index of an expert in the stored tensors, as int64: products with strides exceed 2^31."""
    stored = expert.to(tl.int64)
    if HAS_EXPERT_MAP:
        stored = tl.load(expert_map + stored).to(tl.int64)
    return stored


@triton.jit
def reduce_split_k(value, offsets, partial, counters, tile, pid_k, SIZE: tl.constexpr, SPLIT_K: tl.constexpr):
    """Sum the `value` of SPLIT_K programs: (sum, whether this program has it).

    Each stores its part in `partial`; the last to arrive adds all parts in a fixed order, so the sum does not
    depend on which one that was, and resets the counter to 0.
    """
    base = partial + tile.to(tl.int64) * (SPLIT_K * SIZE)
    tl.store(base + pid_k * SIZE + offsets, value)
    # One thread increments the counter: all threads must have stored first.
    tl.debug_barrier()
    arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu")
    last = arrived == SPLIT_K - 1
    total = tl.zeros_like(value)
    if last:
        tl.store(counters + tile, 0)
        for part in range(SPLIT_K):
            # .cg reads the L2 cache, where the other programs' stores are.
            total += tl.load(base + part * SIZE + offsets, cache_modifier=".cg")
    return total, last
