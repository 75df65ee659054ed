"""What a sweep refuses, before anything is written."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_surgery import sweep
from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.errors import (
    CheckpointWarning,
    DiskFullError,
    InvalidInputError,
    OutputError,
    PlanMismatchError,
    UsageError,
)
from tests.support import per_expert
from tests.support.command import untouched
from tests.support.faults import SmallDisk
from tests.support.sweeps import COUNTS, RANKINGS, ranking


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rankings": []}, UsageError, "no ranking"),
        ({"experts": []}, UsageError, "`experts`: name at least one"),
        ({"experts": [0]}, UsageError, "`experts` 0: the model has 8 experts"),
        ({"experts": [9]}, UsageError, "`experts` 9: the model has 8 experts"),
        ({"rankings": [("a", RANKINGS[0][1]), ("a", RANKINGS[1][1])]}, UsageError, "two rankings"),
        ({"rankings": [("a/b", RANKINGS[0][1])]}, UsageError, "NAME=FILE"),
        ({"rankings": [("..", RANKINGS[0][1])]}, UsageError, "NAME=FILE"),
        (
            {"rankings": ["published:law"]},
            PlanMismatchError,
            "ranking law: the plan is for gpt_oss with 24 layers",
        ),
        ({"rankings": [("a", ranking(0, model_type="mixtral"))]}, PlanMismatchError, "ranking a: "),
        ({"store": "q4"}, UsageError, "`store` q4"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_written(
    source: Path, tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"rankings": RANKINGS, "experts": COUNTS, **change}
    with pytest.raises(error, match=message):
        sweep(source, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_folders_that_are_in_the_way_are_named_and_stay(source: Path, tmp_path: Path, copied: Path) -> None:
    with untouched(source):
        for out in (source, source / "out", source.parent):
            with pytest.raises(UsageError, match="source checkpoint"):
                sweep(source, out, RANKINGS, COUNTS)
        file = tmp_path / "file"
        file.write_text("x")
        with pytest.raises(OutputError, match="is not a folder"):
            sweep(source, file, RANKINGS, COUNTS)
        with pytest.raises(OutputError, match="no such folder"):
            sweep(source, tmp_path / "no" / "out", RANKINGS, COUNTS)
        (tmp_path / "other" / "math-2").mkdir(parents=True)
        with pytest.raises(OutputError, match=r"math-2 is in the way"):
            sweep(source, tmp_path / "other", RANKINGS, COUNTS)
        assert os.listdir(tmp_path / "other") == ["math-2"]
        with pytest.raises(OutputError, match=r"law-2: holds another checkpoint than this sweep would write"):
            sweep(source, copied, [("law", ranking(7))], COUNTS)
        (copied / "index.json").write_text("{}")
        with pytest.raises(InvalidInputError, match="not the index of a sweep"):
            sweep(source, copied, RANKINGS, COUNTS)


def test_a_disk_that_is_too_small_is_known_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match="needs"):
        sweep(source, tmp_path / "out", RANKINGS, COUNTS, ops=SmallDisk(100_000))
    assert not os.listdir(tmp_path / "out")


def test_a_file_system_without_links_says_what_to_do(source: Path, tmp_path: Path) -> None:
    class Unlinked(FileOps):
        def link(self, old: object, new: object) -> None:
            raise OSError(95, "Operation not supported")

        def clone_range(self, *_: object) -> None:
            raise OSError(95, "Operation not supported")

    with pytest.raises(OutputError, match=r"neither by reflink nor by hard link.*`share=False`"):
        sweep(source, tmp_path / "out", RANKINGS, COUNTS, ops=Unlinked())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["index.json", "law-2"]


def test_counts_that_the_router_cannot_use_are_left_out_and_named(tmp_path: Path) -> None:
    settings = per_expert.config(n_group=2, topk_group=1)
    source = per_expert.write(tmp_path / "source", per_expert.deepseek("bf16"), settings)
    made = replace(ranking(3, 3, per_expert.EXPERTS, "deepseek_v3"), layer_numbers=(1, 2, 3))
    with pytest.warns(CheckpointWarning, match="leaving out 3, 5 experts: "):
        result = sweep(source, tmp_path / "out", [("r", made)], [3, 4, 5, 6], dry_run=True)
    assert [v.experts for v in result.variants] == [4, 6]
    with pytest.raises(PlanMismatchError, match="`experts` 3, 5: "):
        sweep(source, tmp_path / "out", [("r", made)], [3, 5], dry_run=True)
