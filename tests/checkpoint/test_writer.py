"""A file gets its name only when it is whole and flushed."""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.writer import OutputFile, write_file
from moe_surgery.errors import DiskFullError, OutputError

from ..support.faults import FaultyOps, ShortOps, open_files


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def aligned(content: bytes) -> memoryview:
    buffer = mmap.mmap(-1, max(1, len(content)))
    buffer[: len(content)] = content
    return memoryview(buffer)[: len(content)]


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(
    "cuts",
    [
        [],
        [4096],
        [1],
        [4095],
        [4097],
        [8192, 12288],
        [100, 4096, 5000, 8192],
        [12287],
        list(range(0, 13000, 700)),
    ],
)
def test_pieces_written_in_order_make_the_file(path: Path, cuts: list[int], direct: bool) -> None:
    content = random.Random(0).randbytes(13_001)
    file = OutputFile(path, FileOps(), direct=direct)
    for begin, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
        file.write(aligned(content[begin:end]), begin)
    assert not path.exists()
    file.publish()
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("reserved", [False, True])
def test_pieces_written_by_threads_make_the_file(path: Path, direct: bool, reserved: bool) -> None:
    """The last piece is shorter than a block, which ends direct writes while others are still in flight."""
    content = random.Random(4).randbytes(100 * 4096 + 17)
    file = OutputFile(path, FileOps(), direct=direct)
    if reserved:
        file.reserve(len(content))
    offsets = list(range(0, len(content), 4096))
    random.Random(5).shuffle(offsets)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda o: file.write(aligned(content[o : o + 4096]), o), offsets))
    file.publish()
    assert path.read_bytes() == content


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EOPNOTSUPP])
def test_space_that_cannot_be_reserved_is_left_to_the_writes(path: Path, code: int) -> None:
    class Refuses(FileOps):
        def allocate(self, fd: int, nbytes: int) -> bool:
            raise OSError(code, os.strerror(code))

    file = OutputFile(path, Refuses())
    file.reserve(1 << 30)
    file.write(aligned(b"abc"), 0)
    file.publish()
    assert path.read_bytes() == b"abc"


def test_unaligned_buffer_is_written(path: Path) -> None:
    content = random.Random(1).randbytes(40_000)
    file = OutputFile(path, FileOps())
    file.write(memoryview(b"x" + content)[1:], 0)
    file.publish()
    assert path.read_bytes() == content


@pytest.mark.parametrize("some", [lambda n: 1, lambda n: -(-n // 2), lambda n: min(n, 5000)])
def test_short_writes_are_continued(path: Path, some: Callable[[int], int]) -> None:
    content = random.Random(2).randbytes(20_000)
    file = OutputFile(path, ShortOps(some))
    file.write(aligned(content), 0)
    file.publish()
    assert path.read_bytes() == content


def test_empty_file_is_a_file(path: Path) -> None:
    write_file(path, b"", FileOps())
    assert path.read_bytes() == b""


def test_file_system_without_direct_writes_takes_plain_ones(path: Path) -> None:
    class Refuses(FileOps):
        def set_direct(self, fd: int, direct: bool) -> bool:
            return False

    class RefusesLate(FileOps):
        direct = False

        def set_direct(self, fd: int, direct: bool) -> bool:
            self.direct = direct
            return True

        def pwrite(self, fd: int, data: memoryview | bytes, offset: int) -> int:
            if self.direct:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return super().pwrite(fd, data, offset)

    content = random.Random(3).randbytes(9000)
    for ops in (Refuses(), RefusesLate()):
        file = OutputFile(path, ops)
        file.write(aligned(content), 0)
        file.publish()
        assert path.read_bytes() == content
        path.unlink()


def test_file_is_flushed_before_it_has_its_name(path: Path) -> None:
    steps: list[str] = []

    class Watched(FileOps):
        def fsync(self, fd: int) -> None:
            steps.append("flush")
            super().fsync(fd)

        def close(self, fd: int) -> None:
            steps.append("close")
            super().close(fd)

        def rename(self, old: str | os.PathLike[str], new: str | os.PathLike[str]) -> None:
            steps.append("rename")
            super().rename(old, new)

    write_file(path, b"content", Watched())
    assert steps == ["flush", "close", "rename"]


@pytest.mark.parametrize("kind", ["open", "pwrite", "fsync", "close", "rename"])
@pytest.mark.parametrize("forever", [False, True])
@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errno.EIO, OutputError),
        (errno.ENOSPC, DiskFullError),
        (errno.EDQUOT, DiskFullError),
        (errno.EFBIG, DiskFullError),
    ],
)
def test_failure_leaves_neither_file_nor_descriptor(
    path: Path, kind: str, forever: bool, code: int, error: type[OutputError]
) -> None:
    before = open_files(path.parent)
    with pytest.raises(OutputError) as caught:
        write_file(path, b"content", FaultyOps(kind, 1, code, forever=forever))
    assert type(caught.value) is error
    assert path.name in str(caught.value)
    assert os.strerror(code) in str(caught.value)
    assert open_files(path.parent) == before
    assert os.listdir(path.parent) == []


def test_failed_flush_is_not_tried_again(path: Path) -> None:
    ops = FaultyOps("fsync", 1, errno.EIO)
    with pytest.raises(OutputError):
        write_file(path, b"content", ops)
    assert ops.calls["fsync"] == 1


def test_temporary_name_that_is_taken_is_not_written_to(path: Path, tmp_path: Path) -> None:
    temporary = tmp_path / ".model.safetensors.tmp"
    for make in (lambda: temporary.write_text("precious"), lambda: temporary.symlink_to(tmp_path / "victim")):
        make()
        with pytest.raises(OutputError, match="cannot create: File exists"):
            OutputFile(path, FileOps())
        assert not (tmp_path / "victim").exists()
        if not temporary.is_symlink():
            assert temporary.read_text() == "precious"
        temporary.unlink()


def test_discarded_file_is_gone_and_may_be_discarded_twice(path: Path) -> None:
    before = open_files(path.parent)
    file = OutputFile(path, FileOps())
    file.write(aligned(bytes(5000)), 0)
    file.discard()
    file.discard()
    assert open_files(path.parent) == before
    assert os.listdir(path.parent) == []
