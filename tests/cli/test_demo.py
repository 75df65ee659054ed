"""The demo does the main job, and what it shows makes sense.

It runs once; that the command shows such a result is seen with the result, and with a demo that nothing is asked in.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("tokenizers")

from moe_surgery import inspect, verify
from moe_surgery.cli.demo import show
from moe_surgery.cli.terminal import Terminal
from moe_surgery.demo import KEPT, SOURCE, DemoResult, asked_questions, profile_texts, run_demo
from moe_surgery.errors import OutputError
from moe_surgery.examples.skills import DOMAINS
from tests.support.command import assert_sound, call, done

COUNT = 10
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, list[str], Path]:
    recorded: list[str] = []
    out = tmp_path_factory.mktemp("demo") / "models"
    return run_demo(out, recorded.append, questions=COUNT), recorded, out


Shown = tuple[DemoResult, list[str], Path]


def test_there_is_a_row_for_the_full_model_each_domain_and_random_experts(shown: Shown) -> None:
    result, recorded, out = shown
    names = ["full", *(f"{domain}-{KEPT}" for domain in DOMAINS), f"random-{KEPT}"]
    fewer = ["numbers-3", "numbers-3-repaired"]
    assert [row.name for row in result.rows] == [*names, *fewer]
    assert [row.domain for row in result.rows] == [None, *DOMAINS, None, "numbers", "numbers"]
    assert [row.name for row in result.rows if row.repaired] == fewer[1:]
    for row in result.rows:
        inspection = inspect(SOURCE if row.name == "full" else out / row.name)
        assert (row.experts, row.nbytes) == (inspection.experts, inspection.nbytes)
        assert row.verified
        assert row.tokens_per_second
        assert any(row.name in line for line in recorded)
    assert verify(out / names[1], source=SOURCE).ok


def test_the_full_model_answers_and_a_domains_own_experts_keep_that(shown: Shown) -> None:
    full, *pruned, random = shown[0].rows[:-2]
    for row in pruned:
        assert row.domain is not None
        own = row.accuracy[row.domain]
        assert full.accuracy[row.domain] >= 0.9
        assert own >= 0.85
        assert own >= random.accuracy[row.domain] + 0.5
        others = [row.accuracy[d] for d in DOMAINS if d != row.domain]
        assert sum(others) / len(others) < own / 2


def test_the_repaired_model_has_small_tensors_changed_and_answers_more(shown: Shown) -> None:
    result, _, out = shown
    pruned, repaired = result.rows[-2:]
    assert (pruned.experts, pruned.nbytes) == (repaired.experts, repaired.nbytes)
    verification = verify(out / repaired.name, source=SOURCE)
    assert verification.ok
    assert any("router" in name for name in verification.repaired)
    assert repaired.accuracy["numbers"] >= pruned.accuracy["numbers"] + 0.2


def test_examples_hold_what_the_models_answered(shown: Shown) -> None:
    result, _, _ = shown
    assert len(result.examples) == 3
    for example in result.examples:
        assert list(example.replies) == ["full", f"{example.domain}-{KEPT}", f"random-{KEPT}"]
        assert "\n" not in "".join(example.replies.values())
    assert any(example.replies["full"] == example.answer for example in result.examples)


def test_the_report_page_is_written_where_it_is_said(shown: Shown) -> None:
    result, _, out = shown
    assert result.report == out / "report.html"
    page = result.report.read_text()
    assert all(domain in page for domain in DOMAINS)


def test_every_model_is_in_the_folder_given_and_pruned_soundly(shown: Shown) -> None:
    result, _, out = shown
    folders = [entry for entry in out.iterdir() if entry.is_dir()]
    assert {folder.name for folder in folders} == {row.name for row in result.rows[1:]}
    kept = {entry.name for entry in out.iterdir()} - {folder.name for folder in folders}
    assert kept == {*(f"{domain}.txt" for domain in DOMAINS), "numbers.jsonl", "tiny.stats", "report.html"}
    for folder in folders:
        if not folder.name.endswith("-repaired"):
            assert_sound(folder, SOURCE)


def test_the_table_has_every_model_and_says_where_they_are(shown: Shown, capsys: Capture) -> None:
    result, _, out = shown
    show(Terminal(), result)
    printed = capsys.readouterr()
    assert printed.out.count("yes") == len(result.rows) == 9
    assert all(row.name in printed.out for row in result.rows)
    assert all(example.question in printed.out for example in result.examples)
    assert f"inspect {out / result.rows[1].name}" in printed.err


def test_as_json_it_holds_the_whole_result(shown: Shown, capsys: Capture) -> None:
    result, _, out = shown
    terminal = Terminal()
    terminal.json = True
    show(terminal, result)
    printed = json.loads(capsys.readouterr().out)
    assert printed["models"] == [asdict(row) for row in result.rows]
    assert printed["examples"] == [asdict(example) for example in result.examples]
    assert printed["report"] == str(out / "report.html")


def test_without_a_tokenizer_a_model_is_pruned_and_nothing_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    out = tmp_path / "models"
    ended = done(call(capsys, "demo", "--output", out))
    assert "not installed: a model is pruned and verified, but not run" in ended.err
    assert ended.out.count("yes") == 2
    assert [entry.name for entry in out.iterdir()] == [f"random-{KEPT}"]
    assert_sound(out / f"random-{KEPT}", SOURCE)
    printed = done(call(capsys, "demo", "--json")).json()
    assert [row["name"] for row in printed["models"]] == ["full", f"random-{KEPT}"]
    assert (printed["examples"], printed["report"]) == ([], None)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False])
def test_the_whole_command(tmp_path: Path, capsys: Capture, kept: bool) -> None:
    options = ["--output", tmp_path / "models"] if kept else []
    printed = done(call(capsys, "demo", "--json", "--questions", "1", *options)).json()
    assert [row["domain"] for row in printed["models"]] == [None, *DOMAINS, None, "numbers", "numbers"]
    assert all(set(row["accuracy"].values()) <= {0.0, 1.0} for row in printed["models"])
    assert len(printed["examples"]) == 3
    assert printed["report"] == (str(tmp_path / "models" / "report.html") if kept else None)


def test_no_question_asked_was_profiled() -> None:
    texts = profile_texts()
    for domain, asked in asked_questions(COUNT).items():
        if domain != "facts":
            assert not [q.text for q in asked if q.text in texts[domain]]


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot create: File exists"):
        run_demo(tmp_path, lambda _: None)
    assert list(tmp_path.iterdir()) == []
