"""moe-surgery card: on stdout, into a file, or into the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_surgery import plan_keeping, prune
from tests.card.cards import cells, evaluation_of, metadata, section
from tests.support.checkpoints import write_checkpoint
from tests.support.command import assert_sound, call, contents, run

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source")


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    prune(source, tmp_path / "out", lambda m: plan_keeping([3, 1], m))
    return tmp_path / "out"


@pytest.fixture
def evaluation(source: Path, out: Path, tmp_path: Path) -> Path:
    from moe_surgery.surgery.manifest import load_manifest

    path = tmp_path / "evaluation.json"
    path.write_text(evaluation_of(source, load_manifest(out / "surgery.json").plan, 2).to_json())
    return path


def test_card_goes_to_stdout_a_file_or_json(out: Path, tmp_path: Path, capsys: Capture) -> None:
    before = contents(out)
    card = (out / "README.md").read_text()
    assert call(capsys, "card", out).out == card
    printed = call(capsys, "card", out, "-o", tmp_path / "card.md")
    assert printed.out.startswith(f"{tmp_path}/card.md: model card, ")
    assert (tmp_path / "card.md").read_text() == card
    assert call(capsys, "card", out, "--json").json() == {"output": None, "card": card}
    assert contents(out) == before


def test_card_is_utf8_wherever_it_goes(source: Path, tmp_path: Path) -> None:
    named = tmp_path / "modèle"
    source.rename(named)
    prune(named, tmp_path / "out", lambda m: plan_keeping([0], m))
    env = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    ended = run("card", tmp_path / "out", env=env)
    assert ended.code == 0
    assert "modèle" in ended.out


def test_card_with_an_evaluation_is_written_into_the_checkpoint(
    source: Path, out: Path, evaluation: Path, capsys: Capture
) -> None:
    options = ["--evaluation", evaluation, "--base-model", "a/b", "--license", "mit", "--write"]
    ended = call(capsys, "card", out, *options)
    assert ended.code == 0, ended.err
    text = (out / "README.md").read_text()
    assert "rerouted" in text
    assert (metadata(text)["base_model"], metadata(text)["license"]) == ("a/b", "mit")
    assert_sound(out, source)
    assert call(capsys, "card", out, *options).code == 0
    (out / "README.md").write_text("by hand")
    refused = call(capsys, "card", out, "--write")
    assert (refused.code, "--overwrite" in refused.error) == (5, True)
    assert call(capsys, "card", out, "--write", "--overwrite").code == 0
    assert_sound(out, source)


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        (["--write", "-o", "x"], 2, "choose one of --write and -o"),
        (["--overwrite"], 2, "--write"),
        (["--base-model", "a b"], 2, "--base-model a b"),
        (["--license", "a b"], 2, "--license a b"),
        (["--evaluation", "nowhere.json"], 5, "nowhere.json"),
        (["--evaluation", "out/config.json"], 3, "is the config.json of a model, not an evaluation"),
        (["-o", "out/README.md"], 2, "--write"),
        (["-o", "out"], 2, "is a folder"),
    ],
)
def test_misuse_is_reported_in_one_line(
    out: Path, options: list[str], code: int, word: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out.parent)
    before = contents(out)
    ended = call(capsys, "card", "out", *options)
    assert ended.code == code
    assert word in ended.error
    assert contents(out) == before


def test_what_was_not_pruned_has_no_card(source: Path, tmp_path: Path, capsys: Capture) -> None:
    assert call(capsys, "card", source).code == 5
    assert call(capsys, "card", tmp_path / "nowhere").code == 5
    assert call(capsys, "card", source / "model.safetensors").code == 5


def test_evaluation_of_another_model_is_refused(out: Path, tmp_path: Path, capsys: Capture) -> None:
    other = write_checkpoint(tmp_path / "other", seed=1)
    from moe_surgery.surgery.manifest import load_manifest

    path = tmp_path / "evaluation.json"
    path.write_text(evaluation_of(other, load_manifest(out / "surgery.json").plan, 2).to_json())
    ended = call(capsys, "card", out, "--evaluation", path)
    assert ended.code == 4
    assert "evaluate against that one" in ended.error


def test_prune_writes_a_card_unless_overwritten_not_to(source: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = ["--keep", "0", "--base-model", "a/b"]
    assert call(capsys, "prune", source, tmp_path / "a", *arguments).code == 0
    assert metadata((tmp_path / "a" / "README.md").read_text())["base_model"] == "a/b"
    assert call(capsys, "prune", source, tmp_path / "b", *arguments, "--no-card").code == 0
    assert not (tmp_path / "b" / "README.md").exists()
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert (folder / "README.source.md").read_bytes() == (source / "README.md").read_bytes()
        assert_sound(folder, source)


def test_what_evaluate_measured_is_what_the_card_shows(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("torch")
    texts, figures, out = tmp_path / "sums.txt", tmp_path / "figures.json", tmp_path / "out"
    texts.write_text("".join(f"Question: What is {a} + 3?\nAnswer: {a + 3}\n\n" for a in range(20)))
    assert call(capsys, "prune", "example:tiny", out, "--keep", "0-15").code == 0
    ended = call(capsys, "evaluate", "example:tiny", out, "--texts", texts, "-o", figures)
    assert ended.code == 0, ended.err
    (full, actual) = (m["overall"] for m in json.loads(figures.read_text())["models"])
    ended = call(capsys, "card", out, "--evaluation", figures, "--write")
    assert ended.code == 0, ended.err
    row = cells(section((out / "README.md").read_text(), "Evaluation"))["`sums`"]
    assert row[:4] == [
        f"{actual['tokens']:,}", f"{full['perplexity']:,.2f}", f"{actual['perplexity']:,.2f}", f"{actual['kl']:.4f}",
    ]  # fmt: skip
    assert_sound(out, "example:tiny")
    assert str(tmp_path) not in (out / "README.md").read_text()
