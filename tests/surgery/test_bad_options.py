"""Plans and options that cannot be used, through the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.support.checkpoints import (
    Shape,
    make_config,
    write_checkpoint,
    write_folder,
)
from tests.support.command import call
from tests.surgery.refusals import (
    refused,
)

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", shards=2)


def plan(**changes: object) -> dict[str, object]:
    return {
        "format": "moe-surgery.plan",
        "version": 1,
        "model_type": "gpt_oss",
        "num_source_experts": 4,
        "num_layers": 2,
        "top_k": None,
        "layers": [[0, 1], [1, 3]],
        "provenance": {},
    } | changes


@pytest.mark.parametrize(
    ("code", "changes", "why"),
    [
        (4, {"model_type": "mixtral"}, "the plan is for mixtral"),
        (4, {"num_source_experts": 32}, "2 layers of 32 experts"),
        (4, {"num_layers": 1, "layers": [[0]]}, "1 layers of 4 experts"),
        (4, {"layers": [[0, 1], [2]]}, "keeps between 1 and 2 experts per layer"),
        (3, {"layers": [[0, 4], [0, 1]]}, "layer 0 keeps expert 4, but experts are 0 to 3"),
        (3, {"layers": [[0, -1], [0, 1]]}, "layers"),
        (3, {"layers": [[0, 1], [2, 2]]}, "layer 1 keeps expert 2 twice"),
        (3, {"layers": [[0], []]}, "layers: layer 1"),
        (3, {"layers": [[0, 1]]}, "num_layers is 2, but layers has 1"),
        (3, {"layers": [[0, 1.0], [0, 1]]}, "layers"),
        (3, {"layers": [[0, True], [0, 1]]}, "layers"),
        (3, {"layers": "all"}, "layers"),
        (3, {"version": 2}, "plan version 2 is not supported"),
        (3, {"format": "moe-surgery.ranking"}, "is a ranking, not a plan"),
        (3, {"format": "else"}, "not a plan"),
        (3, {"top_k": 0}, "top_k"),
    ],
)
def test_invalid_plan_is_refused(
    capsys: Capture, source: Path, code: int, changes: dict[str, object], why: str
) -> None:
    path = source.parent / "plan.json"
    path.write_text(json.dumps(plan(**changes)))
    named = (why,) if code == 4 else (why, str(path))
    refused(capsys, code, *named, source=source, options=("--plan", path))


def test_missing_plan_is_refused(capsys: Capture, source: Path) -> None:
    path = source.parent / "plan.json"
    refused(capsys, 5, f"{path}: cannot open: No such file", source=source, options=("--plan", path))


@pytest.mark.parametrize("name", ["-1", "0", "5", "1000"])
def test_number_of_experts_out_of_range(capsys: Capture, source: Path, name: str) -> None:
    ranking = source.parent / "ranking.json"
    ranking.write_text(json.dumps({"layer_0": [3, 1, 0, 2], "layer_1": [0, 1, 2, 3]}))
    options = ("--ranking", ranking, "--experts", name)
    refused(capsys, 2, f"--experts {name}", "choose 1 to 4", source=source, options=options)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--keep", "4"), "--keep keeps expert 4, but experts are 0 to 3"),
        (("--keep", "0,1,0"), "--keep keeps expert 0 twice"),
        (("--store", "bf16"), "exactly one of --plan, --ranking, --imatrix and --keep"),
        (("--keep", "0", "--experts", "1"), "--ranking and --experts need each other"),
        (("--keep", "0", "--max-shard-size", "0"), "--max-shard-size 0: must be at least one byte"),
    ],
)
def test_invalid_options_are_refused(
    capsys: Capture, source: Path, options: tuple[str, ...], why: str
) -> None:
    refused(capsys, 2, why, source=source, options=options)


@pytest.mark.parametrize(
    "options",
    [
        ("--keep", "x"),
        ("--keep", ""),
        ("--keep", "3-1"),
        ("--store", "fp8"),
        ("--max-shard-size", "1XB"),
        ("--no-such",),
    ],
)
def test_malformed_options_are_refused(capsys: Capture, source: Path, options: tuple[str, ...]) -> None:
    ended = call(capsys, "prune", source, source.parent / "out", *options)
    assert ended.code == 2
    assert options[0] in ended.err
    assert "Traceback" not in ended.err
    assert os.listdir(source.parent) == ["source"]


def test_original_layout_without_its_config(capsys: Capture, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", {"a": np.zeros(4, np.uint8)}, make_config(Shape(), "original"))
    refused(capsys, 3, "gpt_oss", source=source)
