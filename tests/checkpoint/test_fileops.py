"""The system calls: kernel features and their fallbacks."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from moe_surgery.checkpoint.fileops import UNSUPPORTED, FileOps

OPS = FileOps()


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("target", ["file", "folder", "full folder", "link"])
def test_rename_new_never_replaces(tmp_path: Path, kind: str, target: str) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    if kind == "file":
        old.write_text("old")
    else:
        old.mkdir()
    if target == "file":
        new.write_text("new")
    elif target == "link":
        new.symlink_to("nowhere")
    else:
        new.mkdir()
    if target == "full folder":
        (new / "file").write_text("")
    inode = new.lstat().st_ino
    with pytest.raises(FileExistsError):
        OPS.rename_new(old, new)
    assert old.exists()
    assert new.lstat().st_ino == inode


def test_rename_new_renames(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    OPS.rename_new(tmp_path / "old", tmp_path / "new")
    assert os.listdir(tmp_path) == ["new"]


def test_rename_new_of_nothing_names_both(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        OPS.rename_new(tmp_path / "old", tmp_path / "new")
    assert caught.value.filename == str(tmp_path / "old")
    assert caught.value.filename2 == str(tmp_path / "new")


def test_names_that_are_not_valid_text_are_renamed(tmp_path: Path) -> None:
    old = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe old")
    Path(old).write_text("")
    OPS.rename_new(old, tmp_path / "new")
    assert os.listdir(tmp_path) == ["new"]


def test_exchange_swaps_two_names(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "file").write_text("")
    (tmp_path / "other").write_text("other")
    try:
        OPS.exchange(tmp_path / "one", tmp_path / "other")
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            pytest.skip("this file system cannot exchange two names")
        raise
    assert (tmp_path / "one").read_text() == "other"
    assert os.listdir(tmp_path / "other") == ["file"]
    with pytest.raises(FileNotFoundError):
        OPS.exchange(tmp_path / "one", tmp_path / "nowhere")


def test_descriptors_are_not_inherited(tmp_path: Path) -> None:
    fd = OPS.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    assert not os.get_inheritable(fd)
    OPS.close(fd)


def test_clone_range_says_unsupported_where_it_is(tmp_path: Path) -> None:
    """Between two file systems extents are never shared."""
    (tmp_path / "file").write_bytes(bytes(8192))
    source, target = os.open("/proc/self/exe", os.O_RDONLY), os.open(tmp_path / "file", os.O_RDWR)
    try:
        with pytest.raises(OSError, match=r"\[Errno ") as caught:
            OPS.clone_range(source, 1, 1, target, 0)
        assert caught.value.errno in UNSUPPORTED
    finally:
        os.close(source)
        os.close(target)


def test_free_bytes_are_those_of_the_file_system(tmp_path: Path) -> None:
    stat = os.statvfs(tmp_path)
    assert 0 <= OPS.free_bytes(tmp_path) <= stat.f_blocks * stat.f_frsize
    with pytest.raises(FileNotFoundError):
        OPS.free_bytes(tmp_path / "nowhere")


def test_reads_and_writes_are_by_position(tmp_path: Path) -> None:
    fd = OPS.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        assert OPS.pwrite(fd, b"world", 6) == 5
        assert OPS.pwrite(fd, memoryview(b"hello "), 0) == 6
        buffer = bytearray(20)
        assert OPS.pread_into(fd, memoryview(buffer), 6) == 5
        assert buffer[:5] == b"world"
        assert OPS.pread_into(fd, memoryview(buffer), 11) == 0
        assert os.lseek(fd, 0, os.SEEK_CUR) == 0
        OPS.start_writeback(fd, 0, 11)
        OPS.fsync(fd)
        OPS.fsync_dir(tmp_path)
    finally:
        OPS.close(fd)


def test_allocated_file_has_its_size_and_zeros(tmp_path: Path) -> None:
    fd = OPS.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    OPS.pwrite(fd, b"abc", 0)
    if not OPS.allocate(fd, 10_000):
        pytest.skip("this file system does not allocate")
    OPS.close(fd)
    assert (tmp_path / "file").read_bytes() == b"abc" + bytes(9_997)


def test_what_cannot_be_allocated_is_an_error(tmp_path: Path) -> None:
    fd = OPS.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    if not OPS.allocate(fd, 1):
        pytest.skip("this file system does not allocate")
    OPS.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        OPS.allocate(fd, 10_000)
