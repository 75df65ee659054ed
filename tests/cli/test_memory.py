"""--memory of `generate` and `bench decode`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")

from moe_surgery import inspect, plan_random
from tests.support.command import call

Capture = pytest.CaptureFixture[str]
TINY = "example:tiny"
ASKED = ("generate", TINY, "--prompt", "12 + 30 =", "--max-new-tokens", "8")


def test_the_answer_is_the_same(capsys: Capture, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(plan_random(8, 0, inspect(TINY)).to_json())
    expected = call(capsys, *ASKED)
    for options in ((), ("--residency", str(plan)), ("--residency", str(plan), "--draft-plan", str(plan))):
        ended = call(capsys, *ASKED, "--memory", "64GB", *options)
        assert (ended.code, ended.out) == (0, expected.out)


def test_figures_by_limit(capsys: Capture, tmp_path: Path) -> None:
    quick = (
        "bench",
        "decode",
        TINY,
        "--depth",
        "8",
        "--steps",
        "2",
        "--rounds",
        "2",
        "--memory",
        "63GB,64GB",
    )
    ended = call(capsys, *quick, "--plot", str(tmp_path / "memory.png"))
    assert ended.code == 0, ended.err
    assert all(word in ended.out for word in ("63.00 GB", "64.00 GB", "hit rate", "of disk"))
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads(call(capsys, *quick, "--json").out)["rows"]
    assert [row["memory"] for row in rows] == [63 * 10**9, 64 * 10**9]
    for row in rows:
        assert (row["slots"], row["experts"], row["rounds"]) == (128, 128, 2)
        assert 0 < row["hit_rate"] <= 1
        assert len(row["hit_rates"]) == 4
        assert row["decode_rate"]["median"] > 0
        assert row["disk_rate"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("generate", TINY, "--prompt", "x", "--memory", "1MB"),
            "--memory 0.0 GB: this model needs at least",
        ),
        (("generate", TINY, "--prompt", "x", "--memory", "lots"), "'lots' is not a size; write 5GB"),
        (("generate", TINY, "--prompt", "x", "--residency", "plan.json"), "--residency needs --memory"),
        (("bench", "decode", TINY, "--memory", "1GB,much"), "'much' is not a size"),
        (("bench", "decode", TINY, TINY, "--memory", "64GB"), "--memory measures one CKPT"),
        (("bench", "decode", TINY, "--residency", "plan.json"), "--residency needs --memory"),
        (("bench", "decode", TINY, "--memory", "64GB", "--steps", "0"), "--steps 0: must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_one_line(capsys: Capture, arguments: tuple[str, ...], said: str) -> None:
    ended = call(capsys, *arguments)
    assert ended.code == 2
    assert said in ended.err
