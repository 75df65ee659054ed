"""moe-surgery trace."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("tokenizers")

from moe_surgery.pipeline.planning import inspect
from moe_surgery.selection.plan import Plan, plan_random
from tests.support.command import call

Capture = pytest.CaptureFixture[str]
TINY = "example:tiny"


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "random-8.json"
    path.write_text(plan_random(8, 0, inspect(TINY)).to_json())
    return path


def test_it_writes_the_page_and_prints_what_the_plan_costs(
    plan: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "trace.html"
    ended = call(
        capsys, "trace", TINY, "--prompt", "12 + 30 = 42", "--plan", plan, "-o", out, "--title", "A <sum>",
        "--backend", "reference",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    page = out.read_text()
    assert "<h1>A &lt;sum&gt;</h1>" in page
    assert ended.out.startswith("random-8.json: KL ")
    assert "backend reference" in ended.err
    assert f"{out}: " in ended.err
    again = call(
        capsys, "trace", TINY, "--prompt", "12 + 30 = 42", "--plan", plan, "-o", out, "--title", "A <sum>",
        "--backend", "reference", "--json",
    )  # fmt: skip
    assert out.read_text() == page
    traced = again.json()
    assert traced["format"] == "moe-surgery.trace"
    assert [m["name"] for m in traced["models"]] == ["full", "random-8.json"]
    assert "".join(traced["texts"]) == "12 + 30 = 42"


def test_json_alone_needs_no_output(capsys: Capture) -> None:
    traced = call(capsys, "trace", TINY, "--chat", "What is 2 + 2?", "--generate", 3, "--json").json()
    assert len(traced["tokens"]) <= traced["prompt_tokens"] + 3
    assert traced["settings"]["generate"] == 3
    ended = call(capsys, "trace", TINY, "--prompt", "a")
    assert ended.code == 2
    assert "pass -o FILE for the page, or --json" in ended.error


def test_the_text_may_come_from_stdin(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("7 + 5 = 12\n"))
    assert "".join(call(capsys, "trace", TINY, "--json").json()["texts"]) == "7 + 5 = 12\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "the prompt is empty" in call(capsys, "trace", TINY, "--json").error


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["--prompt", "a", "--chat", "b"], 2, "choose one of --prompt and --chat"),
        (["--prompt", "a", "--generate", "0"], 2, "--generate 0: must be at least 1"),
        (["--prompt", "a", "--plan", "other.json"], 4, "3 layers"),
        (["--prompt", "a", "--plan", "traced.json"], 3, "traced.json: is a trace, not a plan"),
        (["--prompt", "a", "--plan", "gone.json"], 5, "gone.json: cannot open"),
    ],
)
def test_what_cannot_be_traced_is_one_line_and_no_page(
    arguments: list[str],
    code: int,
    error: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.json").write_text(Plan("gpt_oss", 32, ((0, 1),) * 3).to_json())
    Path("traced.json").write_text(json.dumps({"format": "moe-surgery.trace", "version": 1}))
    ended = call(capsys, "trace", TINY, *arguments, "-o", "out.html")
    assert ended.code == code
    assert error in ended.error
    assert not Path("out.html").exists()


def test_the_output_is_not_one_of_the_plans(plan: Path, capsys: Capture) -> None:
    before = plan.read_bytes()
    ended = call(capsys, "trace", TINY, "--prompt", "a", "--plan", plan, "-o", plan)
    assert ended.code == 2
    assert "is an input" in ended.error
    assert plan.read_bytes() == before
