"""The partial folder: one run at a time, a robust journal, an atomic rename."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.staging import Staging, stale_partials
from moe_surgery.errors import DiskFullError, OutputError

from ..support.command import contents, siblings
from ..support.faults import FaultyOps, ShortOps, open_files

ENTRIES: list[dict[str, object]] = [
    {"name": "a", "xxh3_128": "0" * 32, "n": [1, 2.5, None]},
    {"name": "model-00002-of-00003.safetensors", "note": "spaces and\nlines \\ \u00e9"},
    {"name": "c"},
]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def staging(out: Path, digest: str = "d" * 32, ops: FileOps | None = None) -> Staging:
    return Staging(out, digest, ops or FileOps())


@pytest.fixture
def partial(out: Path) -> Path:
    """A partial folder with the files and journal entries of `ENTRIES`."""
    with staging(out) as stage:
        for entry in ENTRIES:
            (stage.folder / str(entry["name"])).write_text("content")
            stage.record(entry)
        return stage.folder


def test_folder_is_hidden_beside_the_output_and_named_by_the_digest(out: Path) -> None:
    with staging(out) as stage:
        assert stage.folder == out.parent / f".out.partial-{'d' * 32}"
        assert stage.folder.is_dir()
        assert stage.finished == []
        assert not out.exists()


def test_what_was_recorded_is_found_again(out: Path, partial: Path) -> None:
    with staging(out) as stage:
        assert stage.finished == ENTRIES
        assert {f.name for f in partial.iterdir()} == {".journal", *(str(e["name"]) for e in ENTRIES)}
        stage.record({"name": "d"})
    with staging(out) as stage:
        assert stage.finished == [*ENTRIES, {"name": "d"}]


def test_another_digest_does_not_see_it(out: Path, partial: Path) -> None:
    with staging(out, "e" * 32) as stage:
        assert stage.finished == []
        assert stage.folder != partial
    assert stale_partials(out) == sorted([partial, stage.folder])


def test_journal_cut_anywhere_keeps_its_whole_lines_and_goes_on(out: Path, partial: Path) -> None:
    journal = partial / ".journal"
    raw = journal.read_bytes()
    ends = [i + 1 for i, byte in enumerate(raw) if byte == ord("\n")]
    assert len(ends) == len(ENTRIES)
    for cut in range(len(raw) + 1):
        journal.write_bytes(raw[:cut] + (b"", b"\0" * 50, b"torn")[cut % 3])
        whole = sum(end <= cut for end in ends)
        with staging(out) as stage:
            assert stage.finished == ENTRIES[:whole]
            stage.record({"name": "next"})
        with staging(out) as stage:
            assert stage.finished == [*ENTRIES[:whole], {"name": "next"}]


def test_flipped_byte_in_the_journal_costs_that_line_and_the_later_ones(out: Path, partial: Path) -> None:
    journal = partial / ".journal"
    raw = journal.read_bytes()
    for offset in range(len(raw)):
        mask = (0x01, 0x80)[offset % 2]
        journal.write_bytes(raw[:offset] + bytes([raw[offset] ^ mask]) + raw[offset + 1 :])
        with staging(out) as stage:
            assert stage.finished == ENTRIES[: raw.count(b"\n", 0, offset)]


def test_what_the_journal_does_not_vouch_for_is_removed(out: Path, partial: Path) -> None:
    before = contents(partial)
    (partial / ".x.safetensors.tmp").write_text("torn")
    (partial / "config.json").write_text("torn")
    (partial / "link").symlink_to(partial / "a")
    (partial / "c").unlink()
    (partial / "c").symlink_to("a")
    (partial / "sub" / "sub").mkdir(parents=True)
    (partial / "sub" / "sub" / "file").write_text("")
    with staging(out):
        assert contents(partial) == {n: d for n, d in before.items() if n != "c"}


def test_link_to_a_folder_inside_is_removed_not_followed(out: Path, partial: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("precious")
    (partial / "link").symlink_to(tmp_path / "elsewhere")
    with staging(out):
        assert not (partial / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "file").read_text() == "precious"


@pytest.mark.parametrize("kind", ["file", "link"])
def test_something_else_under_the_name_of_the_folder_is_in_the_way(
    out: Path, tmp_path: Path, kind: str
) -> None:
    partial = out.parent / f".out.partial-{'d' * 32}"
    (tmp_path / "elsewhere").mkdir()
    if kind == "file":
        partial.write_text("")
    else:
        partial.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="is not a folder of an earlier run; remove it"):
        staging(out)
    assert os.path.lexists(partial)
    assert siblings(out) == [partial.name]


# --- the lock


def test_second_one_is_refused_until_the_first_is_done(out: Path) -> None:
    before = open_files(out.parent)
    with staging(out), pytest.raises(OutputError, match="another run is writing it"):
        staging(out, "e" * 32)
    with staging(out):
        pass
    assert open_files(out.parent) == before
    assert siblings(out) == [f".out.partial-{'d' * 32}"]


def test_outputs_of_other_names_do_not_share_a_lock(out: Path) -> None:
    with staging(out), staging(out.with_name("out2")), staging(out.with_name("ou")):
        pass


def test_lock_file_of_a_killed_run_is_no_obstacle(out: Path) -> None:
    out.with_name(".out.lock").write_text("")
    with staging(out):
        pass
    assert not out.with_name(".out.lock").exists()


def test_lock_file_is_not_followed_as_a_link(out: Path, tmp_path: Path) -> None:
    out.with_name(".out.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OutputError, match=r"\.out\.lock: cannot create"):
        staging(out)
    assert not (tmp_path / "victim").exists()


def test_lock_is_let_go_when_the_folder_cannot_be_made(out: Path) -> None:
    before = open_files(out.parent)
    for code, error in ((errno.EIO, OutputError), (errno.ENOSPC, DiskFullError)):
        with pytest.raises(error):
            staging(out, ops=FaultyOps("mkdir", 1, code))
    assert open_files(out.parent) == before
    assert os.listdir(out.parent) == []


def test_lock_left_behind_is_got_even_while_others_come_and_go(out: Path) -> None:
    """A lock on a file that its holder has just removed protects nothing."""
    lock = out.with_name(".out.lock")
    fd = os.open(lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    lock.unlink()
    with staging(out):
        assert lock.exists()
        os.close(fd)
        with pytest.raises(OutputError, match="another run is writing it"):
            staging(out)


# --- giving the name


def test_published_folder_holds_no_journal_and_nothing_is_left(out: Path) -> None:
    with staging(out) as stage:
        (stage.folder / "a").write_text("content")
        stage.record({"name": "a"})
        stage.publish(overwrite=False)
    assert os.listdir(out) == ["a"]
    assert siblings(out) == []


def test_publishing_flushes_the_folder_before_and_its_parent_after_the_rename(out: Path) -> None:
    steps: list[str] = []

    class Watched(FileOps):
        def fsync_dir(self, path: str | os.PathLike[str]) -> None:
            steps.append(f"flush {Path(path).name}")
            super().fsync_dir(path)

        def rename_new(self, old: str | os.PathLike[str], new: str | os.PathLike[str]) -> None:
            steps.append("rename")
            super().rename_new(old, new)

    with staging(out, ops=Watched()) as stage:
        stage.publish(overwrite=False)
    assert steps == [f"flush {stage.folder.name}", "rename", f"flush {out.parent.name}"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_output_created_during_the_run_is_not_touched(out: Path, overwrite: bool) -> None:
    with staging(out) as stage:
        out.mkdir()
        with pytest.raises(OutputError, match="was created by another program during this run"):
            stage.publish(overwrite=overwrite)
        assert stage.folder.exists()
        stage.discard()
    assert os.listdir(out) == []
    assert siblings(out) == []


def test_output_removed_during_the_run_is_created(out: Path) -> None:
    out.mkdir()
    with staging(out) as stage:
        (stage.folder / "a").write_text("new")
        out.rmdir()
        stage.publish(overwrite=True)
    assert (out / "a").read_text() == "new"


def test_short_writes_of_the_journal_are_continued(out: Path) -> None:
    with staging(out, ops=ShortOps(lambda n: 1)) as stage:
        for entry in ENTRIES:
            (stage.folder / str(entry["name"])).write_text("content")
            stage.record(entry)
    with staging(out) as stage:
        assert stage.finished == ENTRIES


@pytest.mark.parametrize("kind", ["open", "pwrite", "fsync", "close"])
def test_journal_that_cannot_be_written_is_an_error(out: Path, kind: str) -> None:
    with staging(out, ops=FaultyOps(kind, 1, errno.ENOSPC)) as stage:
        before = open_files(out.parent)
        with pytest.raises(DiskFullError, match=r"\.journal: cannot write"):
            stage.record(ENTRIES[0])
        assert open_files(out.parent) == before
