"""Every benchmark can still be imported and explains itself; most take too long, or too much disk, for the suite."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from benchmarks import publish

pytest.importorskip("torch")

ROOT = Path(publish.__file__).parent
RESULTS = sorted(publish.RESULTS.glob("*.json"))
SCRIPTS = sorted(
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
    for path in ROOT.rglob("*.py")
    if 'if __name__ == "__main__"' in path.read_text()
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_what_it_does(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module(name).main
    if isinstance(main, click.Command):
        help_text = CliRunner().invoke(main, ["--help"], catch_exceptions=False).output
    else:
        with pytest.raises(SystemExit, match="0"):
            main(["--help"])
        help_text = capsys.readouterr().out
    assert "--help" in help_text
    assert len(help_text.split()) > 30


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_a_result_is_short_and_its_page_shows_the_same_run(file: Path) -> None:
    report = json.loads(file.read_text())
    assert {"how", "date", "machine"} <= set(report)
    assert len(file.read_text().splitlines()) < 100
    page = file.with_suffix(".md").read_text()
    assert report["how"] in page
    assert all(f"- {name}: {value}" in page for name, value in report["machine"].items())


def test_what_is_published_can_be_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = publish.begin("python -m benchmarks.nothing", tmp_path) | {
        "rows": [{"a": 1 / 3, "deep": {"b": [1, 2.5]}}, {"a": None}],
        "parts": {"one": {"ms": publish.span([3.0, 1.0])}, "two": []},
    }
    lines = [*publish.heading("Nothing", report), "", *publish.table(("a", "b"), [(1, "x")])]
    publish.publish("nothing", report, lines, tmp_path)
    again = publish.load("nothing", tmp_path)
    assert again is not None
    assert again["rows"] == [{"a": 0.333333, "deep": {"b": [1, 2.5]}}, {"a": None}]
    assert again["parts"] == {"one": {"ms": [1.0, 3.0]}, "two": []}
    text = (tmp_path / "nothing.md").read_text()
    assert text.startswith("# Nothing\n\npython -m benchmarks.nothing\n\n- ")
    assert text.endswith("\n\n| a | b |\n|---|---|\n| 1 | x |\n")
    assert capsys.readouterr().out.strip() == text.strip()
    assert publish.load("other", tmp_path) is None
