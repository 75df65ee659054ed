"""Checkpoints with F16 and F32 weights give transformers' logits, whole, pruned and as a view."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from moe_surgery import load_model, plan_keeping, prune  # noqa: E402
from moe_surgery.pipeline.planning import make_plan  # noqa: E402
from tests.runtime.models import write_lively  # noqa: E402
from tests.support import oracle  # noqa: E402
from tests.support.checkpoints import Shape, Tensors  # noqa: E402
from tests.support.floats import in_dtype, is_dense, is_expert_weight  # noqa: E402

SHAPE = Shape(experts=5, top_k=2, hidden=96, intermediate=64)
TOLERANCE = 1e-4
MIXES: Mapping[str, tuple[str, Callable[[Tensors], None]]] = {
    "all f16": ("bf16", in_dtype("f16")),
    "all f32": ("bf16", in_dtype("f32")),
    "f16 experts": ("bf16", in_dtype("f16", is_expert_weight)),
    "f32 experts": ("bf16", in_dtype("f32", is_expert_weight)),
    "f32 beside bf16 experts": ("bf16", in_dtype("f32", is_dense)),
    "f32 beside mxfp4 experts": ("mxfp4", in_dtype("f32", lambda n: not n.endswith(("_blocks", "_scales")))),
}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, SHAPE.vocabulary, (2, 70), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mix", MIXES)
def test_logits_are_those_of_transformers(mix: str, ids: torch.Tensor, tmp_path: Path) -> None:
    layout, edit = MIXES[mix]
    folder = write_lively(tmp_path / "in", SHAPE, layout, seed=3, shards=2, edit_tensors=edit)
    expected = oracle.logits_of(oracle.load_model(folder), ids)
    assert expected.std() > 0.3
    got = load_model(folder, dtype=torch.float32, backend="reference")(ids)
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
    without = write_lively(tmp_path / "bf16", SHAPE, layout, seed=3)
    before = load_model(without, dtype=torch.float32, backend="reference")(ids)
    assert (got - before).abs().max() > 10 * TOLERANCE  # so weights cut to BF16 would show


@pytest.mark.parametrize("mix", MIXES)
def test_pruned_and_seen_through_a_plan_they_are_the_same(
    mix: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    layout, edit = MIXES[mix]
    folder = write_lively(tmp_path / "in", SHAPE, layout, seed=3, edit_tensors=edit)
    plan = make_plan(folder, lambda model: plan_keeping([4, 1, 2], model))
    prune(folder, tmp_path / "out", plan)
    pruned = load_model(tmp_path / "out", dtype=torch.float32, backend="reference")(ids)
    seen = load_model(folder, dtype=torch.float32, backend="reference", plan=plan)(ids)
    assert torch.equal(pruned, seen)
    expected = oracle.FullModel(folder, ids).logits(plan.layers)
    torch.testing.assert_close(pruned, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "mxfp4"])
def test_converted_checkpoints_are_what_transformers_computes_from_them(
    dtype: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    folder = write_lively(tmp_path / "in", SHAPE, "bf16", seed=3, edit_tensors=in_dtype("f32"))
    prune(folder, tmp_path / "out", lambda model: plan_keeping(None, model), store=dtype)
    expected = oracle.logits_of(oracle.load_model(tmp_path / "out"), ids)
    got = load_model(tmp_path / "out", dtype=torch.float32, backend="reference")(ids)
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("stored", [torch.float16, torch.float32], ids=["f16", "f32"])
def test_what_transformers_saves_is_read(stored: torch.dtype, ids: torch.Tensor, tmp_path: Path) -> None:
    saved = oracle.load_model(write_lively(tmp_path / "in", SHAPE, "bf16", seed=3), stored)
    for value in saved.parameters():
        value.data *= 1 + torch.rand(value.shape, generator=torch.Generator().manual_seed(1)) / 300
    saved.save_pretrained(tmp_path / "saved")
    expected = oracle.logits_of(oracle.load_model(tmp_path / "saved"), ids)
    got = load_model(tmp_path / "saved", dtype=torch.float32, backend="reference")(ids)
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
    assert np.isfinite(got.numpy()).all()
