"""Inputs are regular files, read in full by position; anything else is refused without blocking."""

from __future__ import annotations

import mmap
import os
import socket
import time
from pathlib import Path

import pytest

from moe_surgery.checkpoint.files import open_regular, read_small_file
from moe_surgery.errors import InvalidInputError, MoeSurgeryError, OutputError

from ..support.faults import open_files

needs_permissions = pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"0123456789")
    return path


def refused(path: Path | str, kind: type[MoeSurgeryError], why: str) -> None:
    """`path` is refused within a second, with one line that names it, and no descriptor stays open."""
    before = open_files(Path(path))
    begin = time.perf_counter()
    with pytest.raises(kind, match=why) as caught:
        open_regular(path)
    assert time.perf_counter() - begin < 1
    assert open_files(Path(path)) == before
    assert Path(path).name in str(caught.value)
    assert str(caught.value).isprintable()


def test_F22_directory_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, InvalidInputError, "is a directory, not a regular file")


def test_F22_fifo_without_writer_is_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.safetensors")
    refused(tmp_path / "fifo.safetensors", InvalidInputError, "is a FIFO")


def test_F22_device_is_refused() -> None:
    refused("/dev/zero", InvalidInputError, "is a character device")


def test_F22_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.safetensors")
        refused("s.safetensors", InvalidInputError, "socket")


def test_F22_dangling_symlink_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link.safetensors").symlink_to("nowhere")
    refused(tmp_path / "link.safetensors", OutputError, "symbolic link to a file that does not exist")


def test_F22_symlink_to_a_fifo_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link.safetensors").symlink_to("fifo")
    refused(tmp_path / "link.safetensors", InvalidInputError, "is a FIFO")


def test_symlink_loop_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    refused(tmp_path / "loop.safetensors", OutputError, "cannot open: Too many levels")


def test_missing_file_is_an_output_error(tmp_path: Path) -> None:
    refused(tmp_path / "absent.safetensors", OutputError, "cannot open: No such file")


def test_file_as_folder_is_an_output_error(file: Path) -> None:
    refused(file / "inside", OutputError, "cannot open: Not a directory")


@needs_permissions
def test_unreadable_file_is_an_output_error(file: Path) -> None:
    file.chmod(0)
    refused(file, OutputError, "cannot open: Permission denied")


@pytest.mark.parametrize("path", ["nul\0byte", "surrogate\ud800"])
def test_path_the_system_cannot_take_is_an_output_error(path: str) -> None:
    with pytest.raises(OutputError, match="not a usable path") as caught:
        open_regular(path)
    assert str(caught.value).isprintable()


def test_regular_file_and_symlink_to_one_are_opened(file: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "snapshots"
    blobs.mkdir()
    (blobs / "link.safetensors").symlink_to(f"../{file.name}")
    for path in (file, blobs / "link.safetensors", str(file)):
        fd = open_regular(path)
        try:
            assert os.read(fd, 100) == b"0123456789"
            assert not os.get_inheritable(fd)
        finally:
            os.close(fd)


def test_read_small_file_up_to_its_limit(file: Path) -> None:
    assert read_small_file(file, limit=10, what="config") == b"0123456789"
    with pytest.raises(InvalidInputError, match="larger than the 9 bytes allowed for config"):
        read_small_file(file, limit=9, what="config")


def test_read_small_file_refuses_by_size_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(InvalidInputError, match="larger than the 100 bytes"):
        read_small_file(path, limit=100, what="config")


def test_read_small_file_counts_what_it_reads_not_what_the_size_says() -> None:
    path = Path("/proc/self/maps")
    if not path.exists():
        pytest.skip("needs a file whose size reads as 0")
    assert read_small_file(path, limit=1 << 24, what="maps").count(b"\n") > 1
    with pytest.raises(InvalidInputError, match="larger than the 10 bytes"):
        read_small_file(path, limit=10, what="maps")


def test_read_small_file_of_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert read_small_file(tmp_path / "empty", limit=0, what="config") == b""


def test_descriptors_are_counted_by_folder(tmp_path: Path) -> None:
    """Counts open descriptors and mappings after a garbage collection."""
    ours, other = tmp_path / "ours", tmp_path / "ours-not"
    for folder in (ours, other):
        folder.mkdir()
        (folder / "file").write_bytes(b"0123")
    with open(other / "file", "rb"):
        assert open_files(ours) == []
        with open(ours / "file", "rb") as file:
            assert open_files(ours) == [os.path.realpath(ours / "file")]
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        assert len(open_files(ours)) == 1
        mapped.close()
        assert open_files(ours) == []
        assert len(open_files(tmp_path)) == 1


def test_no_descriptor_stays_open(file: Path) -> None:
    before = open_files(file.parent)
    read_small_file(file, limit=10, what="config")
    for limit in (9, 0):
        with pytest.raises(InvalidInputError):
            read_small_file(file, limit=limit, what="config")
    assert open_files(file.parent) == before
