"""Where an output may go, and what --overwrite replaces."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from pathlib import Path

import pytest

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.errors import MoeSurgeryError, OutputError
from moe_surgery.pipeline.pruning import prune
from moe_surgery.progress import Progress
from moe_surgery.selection.plan import plan_keeping

from ..support.checkpoints import write_checkpoint
from ..support.command import assert_sound, call, contents, run, siblings, start, untouched
from ..support.faults import FaultyOps, open_files

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "models" / "source", shards=2)


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    """A pruned checkpoint in several shards."""
    folder = tmp_path / "out"
    prune(source, folder, lambda m: plan_keeping([0, 2], m), max_shard_size=5000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def replace(source: Path, out: Path, ops: FileOps | None = None) -> None:
    """Replace `out` by a checkpoint of one shard and three experts."""
    prune(source, out, lambda m: plan_keeping([0, 1, 3], m), overwrite=True, ops=ops)


@pytest.fixture
def replacement(source: Path, tmp_path: Path) -> dict[str, bytes]:
    replace(source, tmp_path / "replacement")
    return contents(tmp_path / "replacement")


# --- where an output may not go


def check_refused(capsys: Capture, source: Path, out: Path | str, code: int, why: str, *more: str) -> None:
    """Pruning to `out` is refused with one line, and no file is touched."""
    with untouched(source.parent.parent):
        ended = call(capsys, "prune", source, out, "--keep", "0", *more)
    assert ended.code == code
    assert why in ended.error
    assert ended.out == ""


def test_existing_output_needs_overwrite(capsys: Capture, source: Path, out: Path) -> None:
    check_refused(capsys, source, out, 5, f"{out}: exists; choose another name, or pass --overwrite")


@pytest.mark.parametrize(
    "kind", ["empty folder", "folder", "other json", "file", "link to folder", "dangling"]
)
def test_overwrite_replaces_only_our_checkpoints(
    capsys: Capture, source: Path, out: Path, tmp_path: Path, kind: str
) -> None:
    stranger = tmp_path / "stranger"
    if kind == "file":
        stranger.write_text("precious")
    elif kind == "link to folder":
        stranger.symlink_to(out)
    elif kind == "dangling":
        stranger.symlink_to("nowhere")
    else:
        stranger.mkdir()
    if kind == "folder":
        (stranger / "model.safetensors").write_text("precious")
    if kind == "other json":
        (stranger / "surgery.json").write_text('{"format": "of a clinic"}')
    why = f"{stranger}: was not written by moe-surgery (no surgery.json); --overwrite will not replace it"
    check_refused(capsys, source, stranger, 5, why, "--overwrite")
    check_refused(capsys, source, stranger, 5, f"{stranger}: exists")


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_source_is_refused_as_output(
    capsys: Capture, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    link = tmp_path / "link"
    link.symlink_to(source)
    monkeypatch.chdir(source)
    for name in (source, link, source / ".." / "source", "../source"):
        check_refused(capsys, source, name, 2, "is the source checkpoint; choose another", *more)


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_folder_around_or_inside_the_source_is_refused_as_output(
    capsys: Capture, source: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    check_refused(capsys, source, source.parent, 2, "contains the source checkpoint", *more)
    check_refused(capsys, source, tmp_path, 2, "contains the source checkpoint", *more)
    check_refused(capsys, source, source / "new", 2, "is inside the source checkpoint", *more)
    (source / "sub").mkdir()
    check_refused(capsys, source, source / "sub" / "new", 2, "is inside the source checkpoint", *more)


def test_manifest_in_a_folder_around_the_source_does_not_make_it_replaceable(
    capsys: Capture, source: Path, out: Path
) -> None:
    (source.parent / "surgery.json").write_bytes((out / "surgery.json").read_bytes())
    check_refused(capsys, source, source.parent, 2, "contains the source checkpoint", "--overwrite")


def test_pruned_checkpoint_is_not_replaced_by_pruning_it(capsys: Capture, source: Path, out: Path) -> None:
    with untouched(out):
        ended = call(capsys, "prune", out, out, "--keep", "0", "--overwrite")
    assert ended.code == 2
    assert "is the source checkpoint" in ended.error


def test_folders_behind_links_of_a_source_are_protected(
    capsys: Capture, source: Path, tmp_path: Path
) -> None:
    """The hub cache: a snapshot of links into a folder of blobs."""
    blobs, snapshot = source.parent / "blobs", source.parent / "snapshots" / "main"
    source.rename(blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    for name, why in ((blobs, "is the source"), (blobs / "new", "is inside"), (source.parent, "contains")):
        with untouched(tmp_path):
            ended = call(capsys, "prune", snapshot, name, "--keep", "0", "--overwrite")
        assert ended.code == 2
        assert why in ended.error
    assert call(capsys, "prune", snapshot, tmp_path / "out", "--keep", "0").code == 0
    assert_sound(tmp_path / "out", blobs)


def test_missing_parent_is_named(capsys: Capture, source: Path, tmp_path: Path) -> None:
    missing = tmp_path / "no" / "such"
    check_refused(capsys, source, missing / "out", 5, f"{missing}: no such folder; create it first")
    (tmp_path / "file").write_text("")
    check_refused(capsys, source, tmp_path / "file" / "out", 5, "no such folder")


@pytest.mark.parametrize("name", ["", ".", "..", "/", "../.."])
def test_output_needs_a_name(
    capsys: Capture, source: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (source.parent / "here").mkdir()
    monkeypatch.chdir(source.parent / "here")
    check_refused(capsys, source, name, 2, "pass the name of the new folder", "--overwrite")


# --- replacing


def test_replaced_output_is_complete_and_the_old_one_removed(
    capsys: Capture, source: Path, out: Path, replacement: dict[str, bytes]
) -> None:
    (out / "notes of the user.txt").write_text("next to the old weights")
    ended = call(capsys, "prune", source, out, "--keep", "0,1,3", "--overwrite")
    assert ended.code == 0
    assert contents(out) == replacement
    assert_sound(out, source)
    assert siblings(out) == []


def test_overwrite_of_nothing_is_a_plain_run(
    source: Path, tmp_path: Path, replacement: dict[str, bytes]
) -> None:
    replace(source, tmp_path / "new")
    assert contents(tmp_path / "new") == replacement


def test_damaged_checkpoint_of_ours_may_be_replaced(
    source: Path, out: Path, replacement: dict[str, bytes]
) -> None:
    next(out.glob("*.safetensors")).unlink()
    replace(source, out)
    assert contents(out) == replacement


def test_old_output_can_be_read_until_it_is_replaced(
    source: Path, out: Path, replacement: dict[str, bytes]
) -> None:
    before = contents(out)

    def look(_: Progress) -> None:
        assert contents(out) == before

    prune(source, out, lambda m: plan_keeping([0, 1, 3], m), overwrite=True, progress=look)
    assert contents(out) == replacement


class NoExchange(FaultyOps):
    """A file system that cannot exchange two names."""

    def exchange(self, one: str | os.PathLike[str], other: str | os.PathLike[str]) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


@pytest.mark.parametrize("table", [FaultyOps, NoExchange])
@pytest.mark.parametrize(
    "kind", ["rename", "rename_new", "exchange", "fsync_dir", "fsync", "unlink", "mkdir"]
)
@pytest.mark.parametrize("forever", [False, True])
def test_failure_leaves_the_old_output_or_the_new(
    source: Path,
    out: Path,
    replacement: dict[str, bytes],
    table: type[FaultyOps],
    kind: str,
    forever: bool,
) -> None:
    old = contents(out)
    for at in range(1, 100):
        ops = table(kind, at, errno.EIO, forever=forever)
        before = open_files(source, out.parent)
        error: MoeSurgeryError | None = None
        try:
            replace(source, out, ops)
        except MoeSurgeryError as caught:
            error = caught
        assert open_files(source, out.parent) == before
        now = contents(out) if out.exists() else None
        if table is NoExchange and kind == "rename_new" and forever and ops.failures > 1:
            # Neither the new output could be moved in nor the old one back: it must still be somewhere.
            assert any(contents(p) == old for p in out.parent.iterdir() if p.is_dir())
            return
        assert now in (old, replacement)
        assert siblings(out) == []
        if not ops.failures:
            assert error is None
            assert now == replacement
            return
        if now == replacement:
            prune(source, out, lambda m: plan_keeping([0, 2], m), max_shard_size=5000, overwrite=True)
            assert contents(out) == old
        else:
            assert isinstance(error, OutputError)
    pytest.fail("never ran clean")


class StoppedAfterExchange(FileOps):
    """Stops the run, like a kill, when the new output has its name and the old one still exists."""

    def exchange(self, one: str | os.PathLike[str], other: str | os.PathLike[str]) -> None:
        super().exchange(one, other)
        raise KeyboardInterrupt


def test_nothing_of_a_replaced_output_gets_into_the_next(
    source: Path, out: Path, replacement: dict[str, bytes]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        replace(source, out, StoppedAfterExchange())
    assert contents(out) == replacement
    replace(source, out)
    assert contents(out) == replacement
    assert_sound(out, source)
    assert siblings(out) == []


class Swapped(FileOps):
    """Another program renames folders just before the exchange."""

    def __init__(self, out: Path, stranger: Path) -> None:
        self._out, self._stranger = out, stranger

    def exchange(self, one: str | os.PathLike[str], other: str | os.PathLike[str]) -> None:
        if self._stranger.exists():
            self._out.rename(self._out.with_name("moved away"))
            self._stranger.rename(self._out)
        super().exchange(one, other)


def test_folder_moved_in_at_the_last_moment_is_not_replaced(source: Path, out: Path, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "precious").write_text("keep me")
    old, precious = contents(out), contents(stranger)
    with pytest.raises(OutputError, match="was created by another program during this run"):
        replace(source, out, Swapped(out, stranger))
    assert contents(out) == precious
    assert contents(tmp_path / "moved away") == old
    assert siblings(out) == []


@pytest.mark.parametrize("moment", range(4))
def test_killed_while_replacing_leaves_the_old_output_or_the_new(
    source: Path, out: Path, replacement: dict[str, bytes], moment: int
) -> None:
    old = contents(out)
    process = start("prune", source, out, "--keep", "0,1,3", "--overwrite")
    if moment % 2:
        while process.poll() is None and not siblings(out):
            time.sleep(0.0005)
        time.sleep(random.Random(moment).uniform(0, 0.02))
    else:
        time.sleep(random.Random(moment).uniform(0.1, 0.4))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert contents(out) in (old, replacement)
    assert run("prune", source, out, "--keep", "0,1,3", "--overwrite").code == 0
    assert contents(out) == replacement
    assert siblings(out) == []
