"""The table of architectures: spelled as the families of safetensors checkpoints are, and as llama.cpp does."""

from __future__ import annotations

import pytest

from moe_surgery.families import FAMILIES
from moe_surgery.families.gguf import ARCHITECTURES, architecture_of

# Families that llama.cpp had no architecture for.
WITHOUT = {"inkling_mm_model", "inkling_text", "longcat_flash"}


def test_every_family_has_an_architecture() -> None:
    behind = {name for a in ARCHITECTURES.values() for name in a.model_types}
    assert {family.model_type for family in FAMILIES} - behind == WITHOUT


def test_names_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    known = set(gguf.MODEL_ARCH_NAMES.values())
    # Newer than the package, or a variant of one that it has.
    newer = {name for name in ARCHITECTURES if name not in known}
    assert len(known & ARCHITECTURES.keys()) > 35
    assert not {n for n in newer if n.replace("_", "-") in known or n.replace("-", "_") in known}


def test_an_unknown_architecture_is_named_after_itself() -> None:
    assert architecture_of("some-moe").model_types == ("some_moe",)
    assert not architecture_of("some-moe").known
    assert architecture_of("qwen3moe").known
