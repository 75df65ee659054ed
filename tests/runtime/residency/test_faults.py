"""A disk that fails or a file that changes is one clear line; nothing leaks, and the model can go on."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from moe_surgery import load_model  # noqa: E402
from moe_surgery.checkpoint.fileops import FileOps  # noqa: E402
from moe_surgery.checkpoint.local_file import LocalFolder  # noqa: E402
from moe_surgery.errors import InvalidInputError, OutputError, UsageError  # noqa: E402
from moe_surgery.runtime.residency.reads import NativeReads  # noqa: E402
from moe_surgery.runtime.usage import process_memory  # noqa: E402
from tests.kernels.native_cases import needs_native  # noqa: E402
from tests.runtime.models import write_lively  # noqa: E402
from tests.runtime.residency.conftest import load_resident  # noqa: E402
from tests.support.checkpoints import Shape  # noqa: E402
from tests.support.faults import ShortOps, open_files  # noqa: E402

SHAPE = Shape(layers=3, experts=5, top_k=2, vocabulary=40)
IDS = torch.arange(6)[None]


class Failing(FileOps):
    """Reads fail while `code` is set."""

    code = 0

    def pread_into(self, fd: int, buffer: memoryview, offset: int, cache: bool = False) -> int:
        if self.code:
            raise OSError(self.code, os.strerror(self.code))
        return super().pread_into(fd, buffer, offset, cache)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_lively(tmp_path / "model", SHAPE)


def test_a_failing_disk_is_one_line_and_the_model_goes_on_afterwards(folder: Path) -> None:
    ops = Failing()
    model = load_resident(LocalFolder(folder, ops), 4)
    expected = load_model(folder)(IDS)
    for _ in range(3):
        ops.code = errno.EIO
        with pytest.raises(
            OutputError, match=r"model.safetensors: cannot read \d+ bytes at \d+: Input/output error"
        ):
            model(IDS)
        ops.code = 0
        torch.testing.assert_close(model(IDS), expected, rtol=1e-5, atol=1e-5)


@needs_native
@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux")
def test_the_same_with_threads_of_the_extension(folder: Path) -> None:
    """Page 0 of this process is not mapped: reading it fails as a disk does."""
    model = load_resident(folder, 4)
    expected = model(IDS)
    assert isinstance(model.pool.reads, NativeReads)
    (file,) = model.pool.files.files.values()
    kept, nowhere = os.dup(file.fileno()), os.open("/proc/self/mem", os.O_RDONLY)
    for _ in range(3):
        os.dup2(nowhere, file.fileno())
        with pytest.raises(
            OutputError, match=r"model.safetensors: cannot read \d+ bytes at \d+: Input/output error"
        ):
            model(IDS)
        os.dup2(kept, file.fileno())
        assert torch.equal(model(IDS), expected)
    os.close(kept)
    os.close(nowhere)


def test_reads_that_stop_short_are_continued(folder: Path) -> None:
    model = load_resident(LocalFolder(folder, ShortOps(lambda n: max(1, n * 2 // 3))), 3)
    torch.testing.assert_close(model(IDS), load_model(folder)(IDS), rtol=1e-5, atol=1e-5)


def test_file_systems_without_direct_reads(folder: Path) -> None:
    class Buffered(FileOps):
        def open(self, path: Any, flags: int, mode: int = 0o666) -> int:
            if flags & getattr(os, "O_DIRECT", 0):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return super().open(path, flags, mode)

    model = load_resident(LocalFolder(folder, Buffered()), 3)
    torch.testing.assert_close(model(IDS), load_model(folder)(IDS), rtol=1e-5, atol=1e-5)


def test_a_file_that_is_written_to_or_cut_is_an_error(folder: Path) -> None:
    model = load_resident(folder, 4)
    model(IDS)
    file = folder / "model.safetensors"
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"x")
    with pytest.raises(InvalidInputError, match=r"model.safetensors: changed while it was open; run again"):
        model(IDS)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(
        InvalidInputError, match=r"model.safetensors: (changed while it was open|ends before byte)"
    ):
        model(IDS)


def test_a_file_that_takes_the_name_changes_nothing(folder: Path) -> None:
    model = load_resident(folder, 4)
    expected = load_model(folder)(IDS)
    shutil.rmtree(folder)
    torch.testing.assert_close(model(IDS), expected, rtol=1e-5, atol=1e-5)


def test_an_interrupted_step_leaves_a_model_that_works(folder: Path) -> None:
    model = load_resident(folder, 4)
    expected = model(IDS)
    backend, calls = model.backend, 0

    class Interrupted(type(backend)):  # type: ignore[misc]
        def experts(self, *arguments: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise KeyboardInterrupt
            return super().experts(*arguments)

    model.backend = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        model(IDS)
    model.backend = backend
    assert torch.equal(model(IDS), expected)


def readers() -> int:
    return sum(thread.name.startswith("read-") for thread in threading.enumerate())


def test_nothing_is_left_of_a_model_that_is_gone(folder: Path) -> None:
    gc.collect()
    threads, files = readers(), open_files(folder)
    model = load_resident(LocalFolder(folder, ShortOps(lambda n: n)), 4)  # read by Python's threads
    model(IDS)
    assert readers() > threads
    assert len(open_files(folder)) == len(files) + 1
    del model
    gc.collect()
    deadline = time.monotonic() + 10
    while readers() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert readers() == threads
    assert open_files(folder) == files


def test_a_load_that_fails_leaves_nothing(folder: Path) -> None:
    gc.collect()
    threads, files, ops = readers(), open_files(folder), Failing()

    class LateFailing(Failing):
        def open_direct(self, path: Any) -> tuple[int, bool]:
            self.code = errno.EIO
            return super().open_direct(path)

    ops = LateFailing()
    with pytest.raises(OutputError, match="Input/output error"):
        load_model(LocalFolder(folder, ops), memory="1TB")
    gc.collect()
    deadline = time.monotonic() + 10
    while readers() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (readers(), open_files(folder)) == (threads, files)


def test_files_elsewhere_are_refused(folder: Path) -> None:
    class NotLocal(LocalFolder):
        def open(self, name: str) -> Any:
            source = super().open(name)
            source.direct = lambda: None  # type: ignore[method-assign,assignment,return-value]
            return source

    with pytest.raises(UsageError, match="`memory` needs files on this machine's disk"):
        load_model(NotLocal(folder), memory="1TB")


@pytest.mark.slow
def test_memory_does_not_grow_over_2000_tokens() -> None:
    model = load_resident("example:tiny", 12)
    ids = torch.randint(0, 2000, (1, 2201), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(1, 2201)
    sizes = []
    for i in range(2200):
        model(ids[:, i : i + 1], cache)
        if i in (199, 2199):
            gc.collect()
            sizes.append(process_memory())
    assert sizes[1] - sizes[0] < 4 << 20
