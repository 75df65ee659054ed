"""Requirements on every source of bytes, and the optional operations of local files."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import random
import re
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.header import build_header, parse_header, read_header
from moe_surgery.checkpoint.local_file import LocalFile, LocalFolder
from moe_surgery.checkpoint.source import ByteSource, read_small
from moe_surgery.errors import InvalidInputError, OutputError

from ..support.faults import FaultyOps, ShortOps
from ..support.sources import MemoryFile, MemorySource

CONTENT = random.Random(3).randbytes(100_001)


@dataclass(frozen=True)
class Case:
    """A kind of source: `open` opens `CONTENT`, `change` replaces it; `notices` if a later read is then refused."""

    open: Callable[[], ByteSource]
    change: Callable[[bytes], None]
    notices: bool = False
    close: Callable[[], None] = lambda: None


def local(folder: Path) -> Case:
    path = folder / "file.bin"
    path.write_bytes(CONTENT)

    def change(content: bytes) -> None:
        path.write_bytes(content)
        os.utime(path, ns=(7, 7))  # independent of the clock's resolution

    return Case(lambda: LocalFile(path), change)


def short_reads(folder: Path) -> Case:
    case = local(folder)
    return Case(lambda: LocalFile(folder / "file.bin", ShortOps(lambda n: min(n, 4097))), case.change)


def memory(_: Path) -> Case:
    file = MemoryFile(CONTENT)

    def change(content: bytes) -> None:
        file.content = content

    return Case(lambda: MemorySource("memory:file.bin", file), change)


def over_http(folder: Path) -> Case:
    """In the storage to which the hub redirects."""
    pytest.importorskip("huggingface_hub")
    from moe_surgery.checkpoint.hub_folder import HubFolder

    from ..support.hub_server import MODEL, HubServer

    name = "file.bin.safetensors"
    (folder / name).write_bytes(CONTENT)
    server = HubServer(folder)

    def change(content: bytes) -> None:
        (folder / name).write_bytes(content)
        os.utime(folder / name, ns=(7, 7))

    return Case(lambda: HubFolder(MODEL, endpoint=server.url).open(name), change, True, server.close)


@pytest.fixture(params=[local, short_reads, memory, over_http], ids=lambda make: make.__name__)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    case: Case = request.param(tmp_path)
    yield case
    case.close()


@pytest.mark.parametrize(
    ("offset", "nbytes"), [(0, 0), (0, 1), (0, 100_001), (1, 4096), (4095, 2), (100_000, 1), (100_001, 0)]
)
@pytest.mark.parametrize("cache", [False, True])
def test_any_range_is_read(case: Case, offset: int, nbytes: int, cache: bool) -> None:
    with case.open() as source:
        buffer = bytearray(nbytes)
        source.read_into(offset, memoryview(buffer), cache=cache)
        assert buffer == CONTENT[offset : offset + nbytes]
        assert source.read(offset, nbytes) == buffer
        source.drop_cache(offset, nbytes)
        assert source.read(offset, nbytes) == buffer


def test_reads_leave_the_bytes_beside_the_buffer(case: Case) -> None:
    with case.open() as source:
        whole = bytearray(b"\xaa" * 30)
        source.read_into(5, memoryview(whole)[10:20])
    assert whole == b"\xaa" * 10 + CONTENT[5:15] + b"\xaa" * 10


def test_size_and_name_are_those_of_the_file(case: Case) -> None:
    with case.open() as source:
        assert source.size == len(CONTENT)
        assert "/file.bin" in source.where or source.where.endswith(":file.bin")
        assert source.where.isprintable()


@pytest.mark.parametrize(("offset", "nbytes"), [(100_000, 2), (100_001, 1), (200_000, 5), (0, 100_002)])
def test_reads_past_the_end_are_refused(case: Case, offset: int, nbytes: int) -> None:
    with case.open() as source:
        message = f"{re.escape(source.where)}: ends before byte {offset + nbytes}"
        for read in (source.read, source.region):
            if source.region(0, 1) is None and read == source.region:
                continue
            with pytest.raises(InvalidInputError, match=message):
                read(offset, nbytes)


def test_threads_read_at_once(case: Case) -> None:
    rng = random.Random(1)
    ranges = [(offset, rng.randrange(5000)) for offset in rng.choices(range(95_000), k=300)]
    with case.open() as source, ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda r: source.read(*r), ranges))
    assert got == [CONTENT[offset : offset + nbytes] for offset, nbytes in ranges]


def test_two_openings_have_the_same_stamp_until_the_bytes_change(case: Case) -> None:
    with case.open() as one, case.open() as other:
        assert one.stamp == other.stamp
        assert hash(one.stamp) == hash(other.stamp)
        assert repr(one.stamp) == repr(other.stamp)
        one.check_unchanged()
        case.change(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
        with case.open() as later:
            assert later.stamp != one.stamp
            assert repr(later.stamp) != repr(one.stamp)
            later.check_unchanged()
        with pytest.raises(InvalidInputError, match=f"{re.escape(one.where)}: changed while"):
            one.check_unchanged()


def test_a_file_that_is_cut_is_an_error_not_a_crash(case: Case) -> None:
    with case.open() as source:
        source.region(0, len(CONTENT))
        case.change(CONTENT[:1000])
        if case.notices:
            with pytest.raises(InvalidInputError, match=f"{re.escape(source.where)}: changed while"):
                source.read(0, 1000)
            return
        assert source.read(0, 1000) == CONTENT[:1000]
        with pytest.raises(InvalidInputError, match="ends before byte 1001"):
            source.read(0, 1001)
        if source.fileno() is not None:
            with pytest.raises(InvalidInputError, match="ends before byte 50000"):
                source.region(0, 50_000)
        with pytest.raises(InvalidInputError):
            source.check_unchanged()


def test_closed_source_reads_no_more(case: Case) -> None:
    source = case.open()
    source.close()
    source.close()
    with pytest.raises(OutputError, match=re.escape(source.where)):
        source.read(0, 10)


def test_what_a_source_offers_beside_reading_holds_the_same_bytes(case: Case) -> None:
    """None if there are no optional operations."""
    with case.open() as source:
        region, mapped, fd, path = source.region(7, 5000), source.map(), source.fileno(), source.path
        assert {x is None for x in (region, mapped, fd, path)} in ({True}, {False})
        source.release(7, 5000)
        if region is not None and mapped is not None and fd is not None and path is not None:
            assert region == CONTENT[7:5007]
            assert os.pread(fd, 5000, 7) == region
            assert path.read_bytes() == CONTENT
            region.release()
            source.close()
            assert mapped[:] == CONTENT  # outlives the source
            mapped.close()


def test_header_is_read_from_it(case: Case) -> None:
    header = build_header([("a", "U8", (4,)), ("b", "BF16", (2, 3))])
    case.change(header + bytes(16))
    with case.open() as source:
        assert read_header(source) == parse_header(header, len(header) + 16, file="x")


def test_header_of_a_file_that_shrinks_after_it_was_opened_is_refused(case: Case) -> None:
    header = build_header([("a", "U8", (4,))])
    case.change(header + b"abcd")
    with case.open() as source:
        case.change(header[:20])
        problem = "changed while" if case.notices else "ends before byte"
        with pytest.raises(InvalidInputError, match=f"{re.escape(source.where)}: {problem}"):
            read_header(source)
    with case.open() as source, pytest.raises(InvalidInputError, match="does not fit a file of 20 bytes"):
        read_header(source)


def test_small_file_is_read_up_to_its_limit(case: Case) -> None:
    with case.open() as source:
        assert read_small(source, limit=len(CONTENT), what="a config") == CONTENT
        with pytest.raises(InvalidInputError, match="larger than the 100000 bytes allowed for a config"):
            read_small(source, limit=100_000, what="a config")


# --- local files and folders


def test_failing_read_says_where_and_why(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(CONTENT)
    with LocalFile(path) as source:
        os.dup2(folder := os.open(tmp_path, os.O_RDONLY), source.fileno())
        os.close(folder)
        with pytest.raises(OutputError, match=f"{path}: cannot read 5 bytes at 8: Is a directory"):
            source.read(8, 5)


def test_reads_continue_through_signals(tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(bytes(64 << 20))
    hits: list[int] = []
    previous = signal.signal(signal.SIGALRM, lambda *_: hits.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        with LocalFile(path) as source:
            for _ in range(5):
                assert len(source.read(0, 64 << 20)) == 64 << 20
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert hits


def cached(source: LocalFile) -> npt.NDArray[np.bool_]:
    """Whether each page of the file is in the page cache."""
    whole = np.frombuffer(source.map(), np.uint8)
    pages = np.zeros(-(-source.size // mmap.PAGESIZE), np.uint8)
    arguments = (ctypes.c_void_p(whole.ctypes.data), ctypes.c_size_t(source.size))
    assert ctypes.CDLL(None).mincore(*arguments, ctypes.c_void_p(pages.ctypes.data)) == 0
    return (pages & 1).astype(bool)


@pytest.mark.skipif(sys.platform != "linux", reason="the system decides what is read ahead")
@pytest.mark.parametrize("stopped", [False, True])
def test_nothing_is_read_ahead_where_that_is_stopped(tmp_path: Path, stopped: bool) -> None:
    path, part = tmp_path / "file.bin", 256 << 10
    path.write_bytes(bytes(16 * part))
    with LocalFile(path) as source:
        os.fsync(source.fileno())
        source.drop_cache(0, source.size)
        if cached(source).any():
            pytest.skip("this file system keeps files in memory")
        if stopped:
            source.expect_slices()
        for offset in (0, part):
            source.read(offset, part)
        pages = cached(source)
    read = 2 * part // mmap.PAGESIZE
    assert pages[:read].all()
    assert bool(pages[read:].any()) is not stopped


SLICES = random.Random(7).randbytes((3 << 20) + 777)


def slices_of(path: Path, ops: FileOps | None = None) -> LocalFile:
    """A file with the content `SLICES`, of which the page cache holds nothing, read in slices."""
    path.write_bytes(SLICES)
    source = LocalFile(path, ops)
    os.fsync(source.fileno())
    source.drop_cache(0, source.size)
    if sys.platform != "linux" or cached(source).any():
        pytest.skip("this file system keeps files in memory")
    source.expect_slices()
    return source


@pytest.mark.parametrize("ops", [None, ShortOps(lambda n: min(n, 17 * 4096))])
@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(0, 1 << 20), (1, 2 << 20), (4095, 200_000), (8192, 131_072), (777, len(SLICES) - 777), (3 << 20, 700)],
)
def test_slices_are_read_whatever_their_place(
    tmp_path: Path, ops: FileOps | None, offset: int, nbytes: int
) -> None:
    with slices_of(tmp_path / "file.bin", ops) as source:
        whole = bytearray(b"\xaa" * (nbytes + 20))
        source.read_into(offset, memoryview(whole)[10:-10])
        assert whole == b"\xaa" * 10 + SLICES[offset : offset + nbytes] + b"\xaa" * 10


def test_slices_bypass_the_page_cache_unless_it_holds_them(tmp_path: Path) -> None:
    direct: list[int] = []

    class Watched(FileOps):
        def pread_into(self, fd: int, buffer: memoryview, offset: int, cache: bool = False) -> int:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                direct.append(offset)
            return super().pread_into(fd, buffer, offset, cache)

    with slices_of(tmp_path / "file.bin", Watched()) as source:
        direct.clear()
        buffer = memoryview(bytearray(1 << 20))
        source.read_into(5, buffer)
        if not direct:
            pytest.skip("this file system has no direct reads")
        assert not cached(source).any()
        source.read(0, 2 << 20)  # stays in the cache
        direct.clear()
        source.read_into(5, buffer)
        assert not direct
        assert buffer == SLICES[5 : 5 + len(buffer)]


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EINVAL])
def test_slices_are_read_where_no_second_descriptor_is_to_be_had(tmp_path: Path, code: int) -> None:
    with slices_of(tmp_path / "file.bin", FaultyOps("open", 1, code, forever=True)) as source:
        buffer = memoryview(bytearray(1 << 20))
        source.read_into(5, buffer)
        assert buffer == SLICES[5 : 5 + len(buffer)]


def test_slices_of_a_file_that_changes_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    with slices_of(path) as source:
        with pytest.raises(InvalidInputError, match=f"{path}: ends before byte {len(SLICES) + 1}"):
            source.read_into(1, memoryview(bytearray(len(SLICES))))
        path.write_bytes(SLICES[:100])
        with pytest.raises(InvalidInputError, match=f"{path}: (ends before byte|changed while)"):
            source.read_into(0, memoryview(bytearray(1 << 20)))
        with LocalFile(path) as other:
            other.expect_slices()
            path.write_bytes(SLICES)
        with LocalFile(path) as other:
            os.utime(path, ns=(1, 1))
            with pytest.raises(InvalidInputError, match=f"{path}: changed while it was open"):
                other.expect_slices()


def test_listing_says_what_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    files = {name for name, is_file in LocalFolder(tmp_path).listing().items() if is_file}
    assert files == {"file", "link"}
    assert len(LocalFolder(tmp_path).listing()) == 6
    with pytest.raises(OutputError, match="nowhere: cannot list: No such file"):
        LocalFolder(tmp_path / "nowhere").listing()
