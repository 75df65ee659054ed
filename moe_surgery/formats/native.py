"""Loads the compiled extension, or says why it is not available.

The environment variable `MOE_SURGERY_NATIVE=0` disables the extension, so that everything runs on
numpy. It is read at every call; the extension itself is imported once.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

__all__ = ["NATIVE_VARIABLE", "native_disabled", "native_module", "native_reason", "native_status"]

NATIVE_VARIABLE = "MOE_SURGERY_NATIVE"


def native_module() -> ModuleType | None:
    """Return the module `moe_surgery._native`, or None when it is disabled or cannot be imported."""
    return None if native_disabled() else _load()[0]


def native_reason() -> str | None:
    """Return why the extension is not available, or None."""
    if native_disabled():
        return f"disabled by {NATIVE_VARIABLE}={os.environ[NATIVE_VARIABLE]}"
    module, reason = _load()
    return f"not available ({reason})" if module is None else None


def native_status() -> str:
    """Return one line that says which instruction sets are in use, or why the extension is not available."""
    if (reason := native_reason()) is not None:
        return f"{reason}; numpy is used"
    module, _ = _load()
    assert module is not None
    names: list[str] = module.instruction_sets()
    return f"{names[0]} (available: {', '.join(names)})"


def native_disabled() -> bool:
    """Whether the environment variable disables the extension."""
    return os.environ.get(NATIVE_VARIABLE, "1").strip() == "0"


@cache
def _load() -> tuple[ModuleType | None, str]:
    # Only ImportError means "not available"; a broken extension should fail visibly.
    try:
        return importlib.import_module("moe_surgery._native"), ""
    except ImportError as error:
        return None, " ".join(str(error).split())
