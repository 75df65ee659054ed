"""The model that the GGUF benchmark writes is one, in whatever number of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import gguf_budgets
from moe_surgery import inspect, plan_random, prune
from tests.support.gguf_slices import assert_pruned


@pytest.mark.parametrize("files", [1, 4])
def test_it_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int) -> None:
    for name, value in {"EXPERTS": 8, "HIDDEN": 256, "WIDTH": 256, "TOKENS": 20, "PIECE": 1 << 20}.items():
        monkeypatch.setattr(gguf_budgets, name, value)
    source = gguf_budgets.make(tmp_path, 3, files)
    assert len(list(tmp_path.iterdir())) == files
    shown = inspect(source)
    assert (shown.model_type, shown.layers, shown.experts, shown.top_k) == ("qwen3_moe", 3, 8, 8)
    plan = plan_random(4, 0, shown)
    prune(source, tmp_path / "out.gguf", plan)
    assert_pruned(source, tmp_path / "out.gguf", dict(enumerate(plan.layers)), 8)
