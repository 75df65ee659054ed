"""Tables fit the terminal: one that is too wide comes in several, and no cell is cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_surgery.cli.terminal import Terminal
from tests.support.command import call

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("width", [60, 100, 140])
@pytest.mark.parametrize("number", [1, 2, 8, 14])
def test_no_table_is_wider_than_the_terminal_and_no_cell_is_cut(
    number: int, width: int, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    columns = ["model", *(f"a long title {i}" for i in range(1, number))]
    rows = [[f"row{r}", *(f"{r}.{i} (1.25-3.75)" for i in range(1, number))] for r in range(3)]
    Terminal().table("title", columns, rows)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width
    for cell in [*columns, *(c for row in rows for c in row)]:
        assert cell in printed
    if number == 14 and width < 140:
        assert printed.count("model") > 1


def test_a_long_name_is_folded_and_stays_whole(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    name = "/a/very/long/path" * 8
    Terminal().table("title", ["model", "loss"], [[name, "1.234"]])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert name in "".join(line.split("1.234")[0].strip() for line in lines)
    assert any(line.rstrip().endswith("1.234") for line in lines)


def test_the_longest_tables_fit_100_columns(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setenv("COLUMNS", "100")
    options = ("--depth", "4", "--rounds", "1")
    for command in (
        ("bench", "decode", "example:tiny", "--steps", "2", *options),
        ("bench", "speculate", "example:tiny", "--draft-top-k", "1", "--draft-lengths", "2", *options),
    ):
        printed = call(capsys, *command)
        assert printed.code == 0, printed.err
        title, *lines = printed.out.splitlines()
        assert max(map(len, lines)) <= 100, title
        assert "…" not in printed.out
