"""The names of formats that counts are imported from: data, without imports."""

from __future__ import annotations

from typing import Final

__all__ = ["FORMATS"]

FORMATS: Final = ("imatrix", "json", "jsonl", "csv", "npy", "sglang")
