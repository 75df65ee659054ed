"""Bytes that a value takes in the formats of expert weights, without any import."""

from __future__ import annotations

__all__ = ["BF16_BYTES", "MXFP4_BYTES"]

BF16_BYTES = 2
# A block of 32 values is 16 bytes of codes and one of scale.
MXFP4_BYTES = 17 / 32
