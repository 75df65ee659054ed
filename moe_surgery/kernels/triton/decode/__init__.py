"""Fused kernels of one decode step, one new token per sequence: everything but the experts.

A layer is residual_norm (joined with qkv at one token), qkv, attention, output, residual_norm, then route
and experts of the parent package; after the last one come residual_norm and unembed. Each function returns
a `Launch` over buffers that the caller keeps, so that a step can be captured once and replayed. The number of
the new token is read from the device (`cache_position`), and the last launch increments it. Not yet measured on a
GPU; numerics are checked through Triton's interpreter and every kernel is compiled for six architectures.
"""

from __future__ import annotations

__all__: list[str] = []
