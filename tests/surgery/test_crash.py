"""A run killed at any moment leaves nothing or a whole checkpoint, and the next run resumes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from moe_surgery.errors import OutputError
from moe_surgery.pipeline.pruning import PruneResult, prune
from moe_surgery.progress import Progress
from moe_surgery.selection.plan import plan_keeping

from ..support import per_expert
from ..support.checkpoints import Shape, write_checkpoint
from ..support.command import (
    PATIENCE,
    assert_sound,
    contents,
    ended,
    run,
    siblings,
    start,
    start_stopped,
    stop_with,
    untouched,
    wait_for,
)

KEPT = list(range(12))
SHARD = r"\.safetensors\.tmp$"


@dataclass(frozen=True)
class Job:
    """A source, options of prune, the result of an undisturbed run and its duration."""

    source: Path
    options: tuple[str, ...]
    expected: dict[str, bytes]
    seconds: float

    @property
    def shards(self) -> int:
        return sum(name.endswith(".safetensors") for name in self.expected)


def make_job(folder: Path, shape: Shape, shards: int, shard_size: str) -> Job:
    source = write_checkpoint(folder / "source", shape, shards=shards)
    return finished_job(source, "--keep", "0-11", "--max-shard-size", shard_size)


def finished_job(source: Path, *options: str) -> Job:
    begin, out = time.monotonic(), source.with_name("expected")
    assert run("prune", source, out, *options).code == 0
    job = Job(source, options, contents(out), time.monotonic() - begin)
    assert job.shards > 20
    return job


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """70 MB."""
    shape = Shape(8, 16, 4, 512, 512, 8, 2, 64, 4096)
    return make_job(tmp_path_factory.mktemp("job"), shape, 12, "2MB")


@pytest.fixture(scope="module")
def small_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """9 MB."""
    shape = Shape(4, 16, 4, 256, 256, 8, 2, 32, 2048)
    return make_job(tmp_path_factory.mktemp("small"), shape, 6, "250kB")


@pytest.fixture(scope="module")
def per_expert_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A model that stores each expert separately, 2 MB in small shards."""
    folder = tmp_path_factory.mktemp("per-expert")
    tensors = per_expert.deepseek("int4 packed", mtp=True, experts=16)
    source = per_expert.write(folder / "source", tensors, per_expert.config(mtp=True, experts=16), shards=5)
    return finished_job(source, "--keep", "0-11", "--max-shard-size", "10kB")


@pytest.fixture(scope="module")
def large_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """500 MB."""
    shape = Shape(16, 16, 4, 1024, 1024, 16, 4, 64, 8192)
    return make_job(tmp_path_factory.mktemp("large"), shape, 24, "10MB")


def partial(out: Path) -> Path | None:
    """The partial folder of `out`, if there is one."""
    return next(out.parent.glob(f".{out.name}.partial-*"), None)


def finished(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of the shards that the journal in the partial folder lists."""
    folder = partial(out)
    try:
        journal = (folder / ".journal").read_bytes() if folder else b""
    except FileNotFoundError:
        journal = b""
    lines = [line for line in journal.splitlines(keepends=True) if line.endswith(b"\n")]
    names = [json.loads(line.rpartition(b" ")[0])["name"] for line in lines]
    assert folder is not None or not names
    return {n: ((folder / n).stat().st_ino, (folder / n).stat().st_mtime_ns) for n in names if folder}


def held_run(job: Job, out: Path, *options: str) -> subprocess.Popen[str]:
    """A live run, stopped when it has finished several shards and starts the next."""
    return start_stopped(SHARD, 6, "prune", job.source, out, *job.options, *options)


def journalled(out: Path) -> int:
    """The same as a number, for a folder that a live run may rename at any moment."""
    try:
        return len(finished(out))
    except FileNotFoundError:
        return 0


def check_killed_run(job: Job, out: Path, moment: int) -> int:
    """Kill a run at a random moment, look, run again, look; the number of shards it had finished."""
    rng = random.Random(moment)
    with untouched(job.source):
        process = start("prune", job.source, out, *job.options)
        if moment % 2:
            time.sleep(rng.uniform(0, job.seconds))
        else:
            expected = rng.randrange(1, job.shards)
            wait_for(lambda: journalled(out) >= expected, process)
            time.sleep(rng.uniform(0, job.seconds / job.shards))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if os.path.lexists(out):
            assert_sound(out, job.source)
            assert contents(out) == job.expected
            return job.shards
        kept = finished(out)
        again = run("prune", job.source, out, *job.options, "--json")
        assert again.code == 0, again.err
    assert sorted(again.json()["outcome"]["shards_resumed"]) == sorted(kept)
    for name, (inode, mtime) in kept.items():
        assert ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) == (inode, mtime), name
    assert contents(out) == job.expected
    assert_sound(out, job.source)
    assert siblings(out) == []
    return len(kept)


@pytest.mark.parametrize("moment", range(4))
def test_run_killed_at_a_random_moment_is_taken_up_by_the_next(job: Job, tmp_path: Path, moment: int) -> None:
    check_killed_run(job, tmp_path / "out", moment)


@pytest.mark.slow
def test_large_run_killed_at_twenty_random_moments(large_job: Job, tmp_path: Path) -> None:
    kept = [check_killed_run(large_job, tmp_path / f"out-{moment}", moment) for moment in range(20)]
    assert any(0 < count < large_job.shards for count in kept)


@pytest.mark.parametrize("name", ["small_job", "per_expert_job"])
def test_run_killed_again_and_again_gets_done(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    small_job: Job = request.getfixturevalue(name)
    out = tmp_path / "out"
    done = 0
    for _ in range(3):
        process = start_stopped(SHARD, 4, "prune", small_job.source, out, *small_job.options)
        assert stop_with(process, signal.SIGKILL).code == -signal.SIGKILL
        assert not out.exists()
        assert len(finished(out)) > done
        done = len(finished(out))
    assert run("prune", small_job.source, out, *small_job.options).code == 0
    assert contents(out) == small_job.expected
    assert siblings(out) == []


def test_interrupt_exits_130_with_one_line_and_the_next_run_goes_on(small_job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with untouched(small_job.source):
        stopped = stop_with(held_run(small_job, out), signal.SIGINT)
        assert stopped.code == 130
        assert stopped.error == "moe-surgery: interrupted; the same command resumes where it stopped"
        assert stopped.out == ""
        assert not out.exists()
        kept = finished(out)
        assert 1 < len(kept) < small_job.shards
        again = run("prune", small_job.source, out, *small_job.options, "--json")
    assert sorted(again.json()["outcome"]["shards_resumed"]) == sorted(kept)
    assert contents(out) == small_job.expected
    assert siblings(out) == []


def test_terminated_run_is_taken_up_by_the_next(small_job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert stop_with(held_run(small_job, out), signal.SIGTERM).code == -signal.SIGTERM
    assert not out.exists()
    assert run("prune", small_job.source, out, *small_job.options).code == 0
    assert contents(out) == small_job.expected
    assert siblings(out) == []


# --- two runs, held still


@pytest.fixture
def paused(small_job: Job, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A live run towards `tmp_path / "out"`, stopped in the middle of its work."""
    process = held_run(small_job, tmp_path / "out")
    yield process
    process.kill()
    process.wait(PATIENCE)


def test_second_live_run_on_one_output_fails_at_once(
    small_job: Job, tmp_path: Path, paused: subprocess.Popen[str]
) -> None:
    out = tmp_path / "out"
    for options in (small_job.options, ("--keep", "0-3"), (*small_job.options, "--overwrite")):
        second = run("prune", small_job.source, out, *options)
        assert second.code == 5
        assert second.error == f"moe-surgery: {out}: another run is writing it; wait for it to finish"
    assert not out.exists()
    paused.send_signal(signal.SIGCONT)
    assert ended(paused).code == 0
    assert contents(out) == small_job.expected
    assert siblings(out) == []


@pytest.mark.parametrize(
    ("kind", "overwrite"),
    [("folder", False), ("folder", True), ("empty folder", True), ("file", False), ("symlink", True)],
)
def test_output_created_during_the_run_is_not_touched(
    small_job: Job, tmp_path: Path, kind: str, overwrite: bool
) -> None:
    out = tmp_path / "out"
    process = held_run(small_job, out, *(["--overwrite"] if overwrite else []))
    if kind.endswith("folder"):
        out.mkdir()
    if kind == "folder":
        (out / "precious").write_text("keep me")
    elif kind == "file":
        out.write_text("keep me")
    elif kind == "symlink":
        out.symlink_to("nowhere")
    before = (out.lstat().st_ino, contents(out) if out.is_dir() else b"")
    process.send_signal(signal.SIGCONT)
    refused = ended(process)
    assert refused.code == 5
    assert "was created by another program during this run; it was not touched" in refused.error
    assert (out.lstat().st_ino, contents(out) if out.is_dir() else b"") == before
    assert siblings(out) == []


# --- damage to what an interrupted run left; small, in this process

SMALL = Shape(experts=16)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", SMALL, shards=3)


def pruned(source: Path, out: Path, *, stop_after: int | None = None) -> PruneResult | None:
    """Prune `source` to shards of 8 kB; interrupted (None) once `stop_after` bytes have passed."""

    def progress(progress: Progress) -> None:
        if stop_after is not None and progress.done > stop_after:
            raise KeyboardInterrupt

    try:
        return prune(source, out, lambda m: plan_keeping(KEPT, m), max_shard_size=8000, progress=progress)
    except KeyboardInterrupt:
        return None


@pytest.fixture
def left(source: Path, tmp_path: Path) -> Path:
    """The partial folder of `tmp_path / "out"` after an interrupted run, several of its shards finished."""
    out = tmp_path / "out"
    assert pruned(source, out, stop_after=60_000) is None
    folder = partial(out)
    assert folder is not None
    assert len(finished(out)) > 3
    return folder


@pytest.fixture
def expected(source: Path, tmp_path: Path) -> dict[str, bytes]:
    assert pruned(source, tmp_path / "expected") is not None
    return contents(tmp_path / "expected")


@pytest.mark.parametrize("where", ["first byte", "middle", "last byte", "cut", "longer", "gone", "a folder"])
def test_damaged_finished_shard_is_written_again(
    source: Path, left: Path, expected: dict[str, bytes], tmp_path: Path, where: str
) -> None:
    out = tmp_path / "out"
    kept = finished(out)
    victim = left / sorted(kept)[1]
    content = bytearray(victim.read_bytes())
    position = {"first byte": 0, "middle": len(content) // 2, "last byte": -1}.get(where)
    if position is not None:
        content[position] ^= 1
        victim.write_bytes(content)
    elif where == "cut":
        os.truncate(victim, len(content) - 1)
    elif where == "longer":
        os.truncate(victim, len(content) + 1)
    else:
        victim.unlink()
        if where == "a folder":
            victim.mkdir()
    result = pruned(source, out)
    assert result is not None
    assert result.outcome is not None
    assert set(result.outcome.shards_resumed) == set(kept) - {victim.name}
    assert contents(out) == expected
    assert siblings(out) == []


@pytest.mark.parametrize("cut", [1, 20, 80])
def test_torn_journal_line_costs_one_shard(
    source: Path, left: Path, expected: dict[str, bytes], tmp_path: Path, cut: int
) -> None:
    out = tmp_path / "out"
    kept = list(finished(out))
    journal = left / ".journal"
    os.truncate(journal, journal.stat().st_size - cut)
    result = pruned(source, out)
    assert result is not None
    assert result.outcome is not None
    assert list(result.outcome.shards_resumed) == kept[:-1]
    assert contents(out) == expected
    assert siblings(out) == []


def test_shard_without_journal_entry_is_written_again_and_stray_files_are_removed(
    source: Path, left: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (left / ".journal").unlink()
    (left / "model-99999-of-99999.safetensors").write_bytes(b"of no run")
    (left / ".model-00001.safetensors.tmp").write_bytes(b"torn")
    (left / "config.json").write_bytes(b"torn")
    (left / "folder").mkdir()
    (left / "folder" / "file").write_bytes(b"of no run")
    result = pruned(source, out)
    assert result is not None
    assert result.outcome is not None
    assert result.outcome.shards_resumed == ()
    assert contents(out) == expected
    assert siblings(out) == []


def test_partial_folder_of_another_source_is_named_and_left_alone(
    source: Path, left: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    before = contents(left)
    shard = source / "model-00001-of-00003.safetensors"
    os.utime(shard, ns=(0, 0))  # as after a new download: nothing of the old run may be trusted
    result = pruned(source, tmp_path / "out")
    assert result is not None
    assert result.outcome is not None
    assert result.outcome.shards_resumed == ()
    assert result.stale == (left,)
    assert contents(left) == before
    assert contents(tmp_path / "out") == expected


def test_partial_folder_that_is_a_link_is_refused(source: Path, left: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    left.rename(elsewhere)
    left.symlink_to(elsewhere)
    before = contents(elsewhere)
    with pytest.raises(OutputError, match="is not a folder of an earlier run; remove it"):
        pruned(source, tmp_path / "out")
    assert contents(elsewhere) == before
    assert not (tmp_path / "out").exists()
