"""evaluate as a command."""

from __future__ import annotations

import json
import re
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


def test_evaluate_by_answers(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan, out = Path("random.json"), Path("e.json")
    done(call(capsys, "plan", TINY, "--random", "-n", 8, "--seed", 1, "-o", plan))
    rows = [{"prompt": f"Question: What is {n} + 2?\nAnswer:", "answer": n + 2} for n in range(1, 5)]
    asked = Path("sums.jsonl")
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["evaluate", TINY, "--plan", plan, "--answers", asked, "--max-new-tokens", 6, *F32, "-o", out]
    printed = done(call(capsys, *arguments))
    result = load_evaluation(out)
    full, random = (model.accuracy["sums"] for model in result.models)
    assert (full.right, full.questions, random.questions) == (4, 4, 4)
    assert set(random.lost) <= {f"sums.jsonl: line {n}" for n in range(1, 5)}
    answers = printed.out.split("sums: answers")[1]
    (line,) = [row for row in answers.splitlines() if row.split()[:1] == [str(plan)]]
    low, high = random.interval
    shown = [random.share, low, high]
    assert re.findall(r"[\d.]+%", line) == [f"{share:.1%}" for share in shown]
    assert line.split()[-4:] == [
        str(len(random.lost)),
        "0",
        f"{random.p_value:.2g}",
        f"{result.models[1].overall.kl:.4f}",
    ]
    replies = out.with_name("e.json.replies.jsonl")
    assert len(replies.read_text().splitlines()) == 1 + 2 * 4
    again = done(call(capsys, *arguments, "--json", "-q")).json()
    assert again == json.loads(out.read_text())
    assert again["models"][1]["answers"]["overall"]["lost"] == list(random.lost)


def test_what_cannot_be_evaluated_by_answers_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "Q", "answer": "x"}\n{"prompt": "Q"}\n')
    for arguments, code, complaint in (
        (["--answers", bad], 3, f"{bad}: line 2: has no 'answer'"),
        (["--answers", "example:law"], 2, "--answers example:law: choose one of arithmetic"),
        ([], 2, "nothing to compare on; pass --texts or --answers"),
        (["--max-new-tokens", 3, "--texts", bad], 2, "--max-new-tokens needs --answers"),
    ):
        ended = call(capsys, "evaluate", TINY, "--top-k", 2, *arguments)
        assert ended.code == code
        assert complaint in ended.error
