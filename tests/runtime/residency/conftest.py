"""Models with their experts on disk, and a limit in experts instead of bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("torch")

if TYPE_CHECKING:
    from moe_surgery.runtime.residency.model import ResidentCausalLM

ROOMY = "1TB"


def load_resident(source: Any, experts: int | None = None, **options: Any) -> ResidentCausalLM:
    """`source` with memory for `experts` experts, by default for all of them."""
    from moe_surgery import load_model
    from moe_surgery.runtime.residency.model import ResidentCausalLM

    model = load_model(source, memory=ROOMY, **options)
    assert isinstance(model, ResidentCausalLM)
    if experts is not None:
        model.budget.experts = experts
        model.pool.resize(experts)
    return model
