"""Predictions and gradients of the pruned model against transformers' model with autograd."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from moe_surgery import load_model, prune  # noqa: E402
from moe_surgery.families.gpt_oss.weights import WEIGHTS  # noqa: E402
from moe_surgery.kernels import differentiable  # noqa: E402
from moe_surgery.kernels.reference import stored_products  # noqa: E402
from moe_surgery.quality.repair import student  # noqa: E402
from moe_surgery.quality.repair.samples import Sample  # noqa: E402
from moe_surgery.quality.repair.student import Student  # noqa: E402
from moe_surgery.quality.repair.targets import Targets, top_tokens  # noqa: E402
from moe_surgery.selection.plan import Plan  # noqa: E402
from tests.runtime.models import write_lively  # noqa: E402
from tests.support import oracle  # noqa: E402
from tests.support.checkpoints import Shape  # noqa: E402

SHAPE = Shape(layers=2, experts=6, top_k=2, sliding_window=4)
PLAN = Plan("gpt_oss", 6, ((1, 4, 5), (3, 0, 2)))
PASSAGES = (tuple(range(1, 12)), (5, 3, 9, 3, 20, 7))


def samples() -> list[Sample]:
    """All predictions of the first passage, the last three of the second."""
    first, second = PASSAGES
    return [Sample("a", first, 0, len(first) - 1, 0), Sample("a", second, 2, 3, len(first) - 1)]


@pytest.fixture(scope="module", params=["mxfp4", "bf16"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lively(tmp_path_factory.mktemp("full") / request.param, SHAPE, request.param, seed=3)


@pytest.fixture(scope="module")
def targets() -> Targets:
    """Arbitrary distributions over the whole vocabulary."""
    generator = torch.Generator().manual_seed(5)
    return top_tokens(torch.randn(13, SHAPE.vocabulary, generator=generator), SHAPE.vocabulary)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in several pieces, attention a few queries at a time and computed again on the way back, logits a few
    rows at a time."""
    monkeypatch.setattr(stored_products, "PIECE_BYTES", 2048)
    monkeypatch.setattr(differentiable, "KEPT_SCORE_BYTES", 64)
    monkeypatch.setattr(student, "LOGIT_BYTES", 4 * 24 * 4)
    monkeypatch.setattr(student, "QUERIES", 3)
    monkeypatch.setattr(student, "KEPT_GRAPH_BYTES", 0)


def expected(folder: Path, targets: Targets) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean divergence and its gradients, of transformers' model of the pruned checkpoint."""
    model = oracle.load_model(folder)
    log_p = torch.zeros(13, SHAPE.vocabulary).scatter(1, targets.ids.long(), targets.log_p)
    start, total = 0, torch.zeros(())
    for sample in samples():
        logits = model(torch.tensor([list(sample.tokens)]), use_cache=False).logits[0]
        rows = torch.log_softmax(logits[sample.start : sample.start + sample.count], dim=-1)
        mine = log_p[start : start + sample.count]
        total = total + (mine.exp() * (mine - rows)).sum()
        start += sample.count
    (total / 13).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(total.detach()) / 13, gradients


def test_divergence_and_gradients_are_those_of_transformers(
    source: Path, targets: Targets, tmp_path: Path
) -> None:
    prune(source, tmp_path / "pruned", PLAN)
    divergence, gradients = expected(tmp_path / "pruned", targets)
    pruned = Student(load_model(source), PLAN, WEIGHTS, norms=True)
    pruned.tensors.require_grad()
    assert pruned.divergence_and_gradient(samples(), targets) == pytest.approx(divergence, rel=1e-5)
    assert set(pruned.tensors.values) == {
        "model.norm.weight",
        *(
            f"model.layers.{i}.{name}"
            for i in range(2)
            for name in (
                "input_layernorm.weight",
                "post_attention_layernorm.weight",
                "mlp.router.weight",
                "mlp.router.bias",
                "mlp.experts.down_proj_bias",
            )
        ),
    }
    for name, value in pruned.tensors.values.items():
        actual, theirs = value.grad, gradients[name]
        assert actual is not None
        assert actual.shape == theirs.shape, name
        torch.testing.assert_close(actual, theirs, rtol=2e-4, atol=1e-5 * float(theirs.abs().max()), msg=name)
    sums = pruned.divergences(samples(), targets, 8)
    assert float(sums.sum()) / 13 == pytest.approx(divergence, rel=1e-5)


def test_a_step_against_the_gradient_lowers_the_divergence_as_the_gradient_says(
    source: Path, targets: Targets
) -> None:
    """Finite differences, in values that stay exact in the checkpoint's dtype."""
    pruned = Student(load_model(source), PLAN, WEIGHTS, norms=False)
    pruned.tensors.dtypes = dict.fromkeys(pruned.tensors.dtypes, torch.float32)
    pruned.tensors.require_grad()
    pruned.divergence_and_gradient(samples(), targets)
    rng = np.random.default_rng(0)
    for name, value in pruned.tensors.values.items():
        assert value.grad is not None
        direction = torch.from_numpy(rng.normal(size=value.shape).astype(np.float32))
        slope = float((value.grad * direction).sum())
        changes = []
        for step in (2e-3, -2e-3):
            pruned.tensors.copy_from({name: value.detach() + step * direction})
            changes.append(float(pruned.divergences(samples(), targets, 64).sum()) / 13)
            pruned.tensors.copy_from({name: value.detach() - step * direction})
        assert (changes[0] - changes[1]) / 4e-3 == pytest.approx(slope, rel=0.05, abs=2e-3), name
