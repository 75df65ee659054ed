"""What glibc's allocator does with large blocks."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from typing import Final

__all__ = ["return_large_blocks"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE: Final = 256 << 10
"""Bytes."""


def return_large_blocks() -> None:
    """Have freed blocks of more than `LARGE` bytes go back to the system at once, in all of this process.

    By default glibc keeps those of up to 32 MiB once some were freed, and seldom finds a use for them: memory grew by
    a layer's attention weights with each layer. Does nothing with other allocators.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(M_MMAP_THRESHOLD, LARGE)
            mallopt(M_TRIM_THRESHOLD, LARGE)
