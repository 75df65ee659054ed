"""Timed commands are real processes: their memory, their failures, and nothing of them left behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moe_surgery.bench.surgery import (
    command_of,
    copy_seconds,
    measure_surgery,
    surgery_figures,
    timed,
)
from moe_surgery.errors import OutputError, UsageError
from tests.support.checkpoints import Shape, write_checkpoint


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", Shape(experts=4))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.mark.parametrize("mib", [1, 200])
def test_peak_memory_is_the_commands_own(work: Path, mib: int) -> None:
    ours = bytearray(300 << 20)  # more than the command takes: it must not count
    ours[::4096] = b"x" * len(ours[::4096])
    result = timed(python(f"b = bytearray({mib} << 20); b[::4096] = b'x' * len(b[::4096])"), work, cold=False)
    assert mib << 20 < result.peak_bytes < (mib + 40) << 20
    assert list(work.iterdir()) == []


def test_a_command_that_fails_says_why(work: Path) -> None:
    with pytest.raises(OutputError, match="exit 3: no luck"):
        timed(python("import sys; print('no luck', file=sys.stderr); sys.exit(3)"), work, cold=False)
    assert list(work.iterdir()) == []


def test_a_copy_is_timed_and_removed(work: Path) -> None:
    (work / "out").mkdir()
    (work / "out" / "a file").write_bytes(b"x" * 1000)
    assert copy_seconds(work / "out", work / "copy", cold=False).seconds > 0
    assert [p.name for p in work.iterdir()] == ["out"]


# Dropping the page cache slows down whatever else runs on the machine.
@pytest.mark.parametrize("cold", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_surgery_is_measured_in_turns_and_leaves_nothing(source: Path, work: Path, cold: bool) -> None:
    runs = list(measure_surgery(str(source), work, expert_counts=[1, 3], rounds=2, cold=cold))
    assert [(r.number, r.experts) for r in runs] == [(0, 1), (0, 3), (1, 3), (1, 1)]
    assert list(work.iterdir()) == []
    rows = surgery_figures(runs)
    assert [(row["experts"], row["rounds"]) for row in rows] == [(1, 2), (3, 2)]
    assert int(str(rows[0]["output_bytes"])) < int(str(rows[1]["output_bytes"]))
    assert all(r.inspect.peak_bytes > 10 << 20 < r.prune.peak_bytes for r in runs)


def test_a_failing_prune_leaves_nothing(source: Path, work: Path) -> None:
    with pytest.raises(OutputError, match="--experts 9: the model has 4 experts"):
        list(measure_surgery(str(source), work, expert_counts=[9], rounds=1, cold=False))
    assert list(work.iterdir()) == []


def test_a_folder_that_is_not_there_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        list(measure_surgery(str(source), tmp_path / "nowhere", expert_counts=[1]))


def test_a_command_is_this_pythons(source: Path) -> None:
    assert command_of("inspect", source) == [sys.executable, "-m", "moe_surgery", "inspect", str(source)]
