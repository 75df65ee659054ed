"""Models in GGUF files: one naming rule for all architectures, and what is known about each of them."""

from __future__ import annotations

from moe_surgery.families.gguf.architectures import ARCHITECTURES, Architecture, architecture_of
from moe_surgery.families.gguf.spec import identify_gguf

__all__ = ["ARCHITECTURES", "Architecture", "architecture_of", "identify_gguf"]
