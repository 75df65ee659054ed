"""evaluate as a command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

from moe_surgery.quality.evaluation import load_evaluation
from moe_surgery.selection.statistics import load_statistics
from tests.support.command import call, done

Capture = pytest.CaptureFixture[str]
TINY = "example:tiny"
F32 = ("--dtype", "f32")


def test_evaluate_shows_and_writes_what_plans_and_checkpoints_cost(
    inputs: Path, tmp_path: Path, capsys: Capture
) -> None:
    plans = []
    for count in (4, 16):
        plans.append(tmp_path / f"{count}.json")
        options = ["--metric", "reap", "-n", count, "-o", plans[-1]]
        done(call(capsys, "plan", inputs / "both.stats", *options))
    pruned, out = tmp_path / "pruned", tmp_path / "e.json"
    done(call(capsys, "prune", TINY, pruned, "--plan", plans[0]))
    arguments = ["evaluate", TINY, pruned, "--plan", plans[0], "--plan", plans[1], *F32]
    arguments += ["--texts", inputs / "sums.txt", "--texts", inputs / "talk.jsonl", "-o", out]
    printed = done(call(capsys, *arguments))
    result = load_evaluation(out)
    assert [m.name for m in result.models] == ["full", *map(str, plans), str(pruned)]
    assert [m.kind for m in result.models] == ["full", "plan", "plan", "checkpoint"]
    _, four, sixteen, same = result.models
    assert (same.domains, same.provenance) == (four.domains, four.provenance)
    assert four.overall.kl > sixteen.overall.kl > 0
    assert four.provenance["method"] == "reap"
    for title in ("sums", "talk", "all domains"):
        assert title in printed.out.splitlines()
    cells = [line.split() for line in printed.out.splitlines() if line.split()[:1] == [str(plans[0])]]
    assert [row[1] for row in cells] == ["4"] * 3
    assert [row[5] for row in cells] == [
        f"{q.kl:.4f}" for q in (four.domains["sums"], four.domains["talk"], four.overall)
    ]
    output = done(call(capsys, *arguments, "--json", "-q"))
    assert output.err == ""
    assert output.json() == json.loads(out.read_text()) == json.loads(result.to_json())


def test_evaluate_on_answers_only(inputs: Path, tmp_path: Path, capsys: Capture) -> None:
    done(call(capsys, "plan", inputs / "both.stats", "--metric", "reap", "-n", 8, "-o", tmp_path / "p.json"))
    arguments = ["evaluate", TINY, "--plan", tmp_path / "p.json", "--texts", inputs / "talk.jsonl", "--json"]
    few = done(call(capsys, *arguments, "--answers-only")).json()
    every = done(call(capsys, *arguments)).json()
    answers = load_statistics(inputs / "talk.stats").tokens["talk:answer"]
    assert few["models"][1]["overall"]["tokens"] == answers < every["models"][1]["overall"]["tokens"]
