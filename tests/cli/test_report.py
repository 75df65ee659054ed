"""moe-surgery report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import moe_surgery
from moe_surgery.selection.statistics import ExpertStatistics, save_statistics
from tests.report.inputs import evaluation_of, made_up, plan_of
from tests.support.command import call

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Statistics, a plan, an evaluation, and the same of another checkpoint."""
    result = {}
    for prefix, identity in (("", "f" * 32), ("other-", "0" * 32)):
        statistics = made_up(3, 8, ["code", "law"])
        statistics.identity = identity
        result[f"{prefix}stats"] = tmp_path / f"{prefix}stats.safetensors"
        result[f"{prefix}plan"] = tmp_path / f"{prefix}plan.json"
        result[f"{prefix}cuts"] = tmp_path / f"{prefix}cuts.json"
        save_statistics(statistics, result[f"{prefix}stats"])
        result[f"{prefix}plan"].write_text(plan_of(statistics, "reap", 2).to_json())
        result[f"{prefix}cuts"].write_text(evaluation_of(statistics).to_json())
    return result


def test_it_writes_the_page_and_says_what_it_shows(
    files: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "report.html"
    ended = call(
        capsys, "report", files["stats"], "--plan", files["plan"], "--evaluation", files["cuts"], "-o", out,
        "--title", "Two <domains>", "--json",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    page = out.read_bytes()
    assert b"<h1>Two &lt;domains&gt;</h1>" in page
    assert ended.json() == {
        "output": str(out),
        "bytes": len(page),
        "identity": "f" * 32,
        "layers": 3,
        "experts": 8,
        "domains": ["code", "law"],
        "plans": ["plan.json"],
        "evaluations": ["cuts.json"],
        "pictures": [],
    }
    assert "3 layers of 8 experts, 2 domains" in ended.err
    # Again: the file is replaced, and the same bytes come out.
    again = call(
        capsys, "report", files["stats"], "--plan", files["plan"], "--evaluation", files["cuts"], "-o", out,
        "--title", "Two <domains>",
    )  # fmt: skip
    assert (again.code, again.out) == (0, "")
    assert out.read_bytes() == page


def test_pictures_are_named_as_they_are_written(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("matplotlib")
    statistics = tmp_path / "one domain.safetensors"
    counted = made_up(1, 4, ["code"])
    counted.data["code"] = [ExpertStatistics(layer.count) for layer in counted.data["code"]]
    save_statistics(counted, statistics)
    ended = call(
        capsys, "report", statistics, "-o", tmp_path / "r.html", "--png", tmp_path / "figures", "--json"
    )
    assert ended.code == 0, ended.err
    pictures = [str(p) for p in (tmp_path / "figures").iterdir()]
    assert sorted(ended.json()["pictures"]) == sorted(pictures)
    assert len(pictures) == 1 + 1  # frequency, and how much of the tokens its experts cover
    assert all(p in ended.err for p in pictures)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--plan", "other-plan"], 4, "other-plan.json: belongs to checkpoint 0000"),
        (["--evaluation", "other-cuts"], 4, "other-cuts.json: belongs to checkpoint 0000"),
        (["--plan", "cuts"], 3, "cuts.json: is an evaluation, not a plan"),
        (["--evaluation", "plan"], 3, "plan.json: is a plan, not an evaluation"),
        (["--plan", "stats"], 3, "stats.safetensors: is a statistics file, not a plan"),
        (["--plan", "missing"], 5, "missing"),
    ],
)
def test_what_does_not_belong_ends_in_one_line_and_no_page(
    files: dict[str, Path], tmp_path: Path, capsys: Capture, arguments: list[str], code: int, said: str
) -> None:
    out = tmp_path / "report.html"
    given = [files.get(a, tmp_path / a) if not a.startswith("-") else a for a in arguments]
    ended = call(capsys, "report", files["stats"], *given, "-o", out)
    assert ended.code == code
    assert said in ended.error
    assert not out.exists()


def test_the_output_is_a_file_and_no_input(files: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    assert "is a folder" in call(capsys, "report", files["stats"], "-o", tmp_path).error
    for name in ("stats", "plan", "cuts"):
        before = files[name].read_bytes()
        ended = call(
            capsys, "report", files["stats"], "--plan", files["plan"], "--evaluation", files["cuts"], "-o",
            files[name],
        )  # fmt: skip
        assert ended.code == 2
        assert "is an input" in ended.error
        assert files[name].read_bytes() == before
    assert call(capsys, "report", files["plan"], "-o", tmp_path / "r.html").code == 3
    assert call(capsys, "report", files["stats"]).code == 2


def test_the_page_needs_neither_torch_nor_matplotlib(files: dict[str, Path], tmp_path: Path) -> None:
    program = (
        "import sys\nfrom moe_surgery.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
        "print(*sorted({n.partition('.')[0] for n in sys.modules}))"
    )
    arguments = ["report", files["stats"], "--evaluation", files["cuts"], "-o", tmp_path / "r.html"]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(moe_surgery.__file__).parent.parent,
    )
    assert not set(done.stdout.split()) & {"torch", "matplotlib", "transformers", "jinja2"}
