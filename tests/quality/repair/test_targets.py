"""Stored distributions against whole ones in numpy float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moe_surgery.quality.repair.samples import Sample  # noqa: E402
from moe_surgery.quality.repair.targets import (  # noqa: E402
    Targets,
    compute_targets,
    divergence,
    predicting_rows,
    top_tokens,
)
from moe_surgery.runtime.model import CausalLM  # noqa: E402


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("top", [1, 7, 50, 80])
def test_what_is_not_stored_counts_as_one_token(top: int) -> None:
    rng = np.random.default_rng(top)
    full, pruned = (rng.normal(scale=3, size=(40, 50)) for _ in range(2))
    p, q = log_softmax(full), log_softmax(pruned)
    order = np.argsort(-full, axis=1)
    expected = np.zeros(40)
    for row in range(40):
        stored, others = order[row, :top], order[row, top:]
        groups = [[token] for token in stored] + ([list(others)] if len(others) else [])
        for group in groups:
            a, b = np.exp(p[row, group]).sum(), np.exp(q[row, group]).sum()
            expected[row] += a * np.log(a / b)
    targets = top_tokens(torch.from_numpy(full).float(), top)
    actual = divergence(torch.from_numpy(pruned).float(), targets).numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    whole = (np.exp(p) * (p - q)).sum(axis=1)
    assert (actual <= whole + 1e-5).all()
    if top >= 50:
        np.testing.assert_allclose(actual, whole, rtol=1e-4, atol=1e-5)


def test_a_certain_prediction_has_a_finite_gradient() -> None:
    certain = torch.full((1, 50), -1e4)
    certain[0, 3] = 1e4
    logits = torch.zeros(1, 50, requires_grad=True)
    kl = divergence(logits, top_tokens(certain, 4))
    kl.sum().backward()
    assert float(kl.detach()) == pytest.approx(np.log(50), rel=1e-5)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_the_rows_of_samples_are_those_that_predict_what_counts() -> None:
    several = [Sample("a", (1, 2, 3, 4), 0, 3, 0), Sample("a", (5, 6, 7), 1, 1, 3)]
    assert predicting_rows(several).tolist() == [0, 1, 2, 5]


def test_the_full_models_distributions_are_kept_on_disk(
    tiny_model: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_surgery.quality.repair.targets.BATCH_TOKENS", 12)
    several = [Sample("a", tuple(range(9, 19)), 0, 9, 0), Sample("b", (40, 7, 300, 2), 1, 2, 9)]
    file = tmp_path / "targets"
    counts: list[int] = []
    targets = compute_targets(tiny_model, several, file, "job", top=5, progress=counts.append)
    assert counts == [10, 4]
    rows = [tiny_model(torch.tensor([s.tokens]))[0, s.start : s.start + s.count] for s in several]
    logits = torch.cat(rows).double().numpy()
    order = np.argsort(-logits, axis=1)[:, :5]
    assert (targets.ids.numpy() == order).all()
    log_p = log_softmax(logits)
    np.testing.assert_allclose(targets.log_p.numpy(), np.take_along_axis(log_p, order, 1), atol=1e-4)
    rest = 1 - np.take_along_axis(np.exp(log_p), order, 1).sum(axis=1)
    np.testing.assert_allclose(targets.rest.exp().numpy(), rest, atol=1e-5)

    def again(job: str) -> tuple[Targets, list[int]]:
        counts: list[int] = []
        return compute_targets(tiny_model, several, file, job, top=5, progress=counts.append), counts

    resumed, counts = again("job")
    assert counts == [14]
    assert all(torch.equal(getattr(resumed, f), getattr(targets, f)) for f in ("ids", "log_p", "rest"))
    assert again("another job")[1] == [10, 4]
