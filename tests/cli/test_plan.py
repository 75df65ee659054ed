"""plan as a command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from moe_surgery import load_plan
from moe_surgery.pipeline.planning import inspect
from moe_surgery.selection.statistics import load_statistics
from tests.cli.scores import score
from tests.support.checkpoints import load_tensors
from tests.support.command import call, done

Capture = pytest.CaptureFixture[str]
TINY = "example:tiny"
F32 = ("--dtype", "f32")


def test_a_plan_straight_from_statistics_is_that_of_their_ranking(
    inputs: Path, tmp_path: Path, capsys: Capture
) -> None:
    options = ["--metric", "reap", "--domain", "talk", "--protect-super-experts"]
    done(call(capsys, "rank", inputs / "both.stats", *options, "-o", tmp_path / "r.json"))
    by_ranking = done(call(capsys, "plan", tmp_path / "r.json", "-n", 6)).json()
    straight = done(call(capsys, "plan", inputs / "both.stats", *options, "-n", 6, TINY)).json()
    assert straight == by_ranking
    output = straight["provenance"]
    assert (output["method"], output["domains"]) == ("reap", ["talk:answer", "talk:prompt"])
    assert output["checkpoint"] == load_statistics(inputs / "both.stats").identity
    assert output["protect_super_experts"] is True
    assert output["texts"]["talk:answer"][0]["xxh3_128"]


@pytest.mark.parametrize("over", ["worst", "mean"])
@pytest.mark.parametrize("wanted", [0.5, 0.95, 1.0])
def test_coverage_keeps_the_fewest_experts_that_carry_it(
    wanted: float, over: str, inputs: Path, capsys: Capture
) -> None:
    options = ["--metric", "frequency", "--domain", "sums", "--coverage", wanted, "--coverage-over", over]
    plan = done(call(capsys, "plan", inputs / "both.stats", *options)).json()
    file = inputs / "both.stats"
    gates = [np.array(score("gate", file, ["sums"], n)) for n in range(4)]
    ranked = [np.argsort(-np.array(score("frequency", file, ["sums"], n)), kind="stable") for n in range(4)]
    count = len(plan["layers"][0])

    def carried(n: int) -> float:
        shares = [g[r[:n]].sum() / g.sum() for g, r in zip(gates, ranked, strict=True)]
        return float(np.mean(shares) if over == "mean" else min(shares))

    assert carried(count) >= wanted - 1e-12
    assert carried(count - 1) < wanted - 1e-12
    assert {len(row) for row in plan["layers"]} == {count}
    assert plan["provenance"]["coverage"] == wanted
    assert plan["provenance"]["coverage_over"] == over


@pytest.mark.parametrize("storage", ["keep", "mxfp4", "bf16"])
def test_a_target_size_keeps_the_most_experts_that_fit_it(
    storage: str, inputs: Path, tmp_path: Path, capsys: Capture
) -> None:
    options = ["--metric", "gate", "--target-size", "4MB", "--store", storage, TINY]
    out = tmp_path / "plan.json"
    done(call(capsys, "plan", inputs / "both.stats", *options, "-o", out))
    plan = load_plan(out)
    count = plan.uniform_experts
    assert count is not None

    def size(n: int) -> int:
        kept = f"0-{n - 1}"
        folder = tmp_path / f"pruned-{n}"
        done(call(capsys, "prune", TINY, folder, "--keep", kept, "--store", storage))
        return sum(t.nbytes for t in load_tensors(folder).values())

    assert size(count) <= 4_000_000 < size(count + 1)
    assert plan.provenance["target_size"] == 4_000_000


def test_target_params_keep_the_most_experts_that_fit(inputs: Path, capsys: Capture) -> None:
    sizes = {size.experts: size.parameters for size in inspect(TINY).sizes}
    options = ["--metric", "gate", TINY, "--target-params"]
    for target, expected in ((sizes[7], 7), (sizes[7] - 1, 6), (sizes[32] * 5, 32)):
        plan = done(call(capsys, "plan", inputs / "both.stats", *options, target)).json()
        assert {len(row) for row in plan["layers"]} == {expected}
        assert plan["provenance"]["target_params"] == target
    random_plan = done(call(capsys, "plan", "--random", *options[2:], sizes[3])).json()
    assert {len(row) for row in random_plan["layers"]} == {3}
