"""The file appears whole or not at all, and nothing else is left behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_surgery import export_gguf
from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.errors import DiskFullError, InvalidInputError, MoeSurgeryError, OutputError, UsageError
from moe_surgery.progress import Progress
from tests.support.checkpoints import Shape, write_checkpoint, write_sparse_checkpoint
from tests.support.command import ended, run, siblings, start, start_stopped, untouched, wait_for
from tests.support.faults import FaultyOps, ShortOps, SmallDisk, each_failure, open_files

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
KINDS = ("open", "pread_into", "pwrite", "fsync", "fsync_dir", "close", "rename_new")
BEYOND_A_CHUNK = Shape(layers=1, experts=2, hidden=1024, intermediate=1024, vocabulary=300)


@pytest.fixture(scope="module", params=["mxfp4", "bf16", "quantised"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, dtype: str) -> Path:
    folder = tmp_path_factory.mktemp("model") / "source"
    return write_checkpoint(folder, BEYOND_A_CHUNK, "mxfp4" if dtype == "mxfp4" else "bf16", shards=2)


@pytest.fixture(scope="module")
def expected(source: Path, dtype: str) -> bytes:
    out = source.with_name("expected.gguf")
    exported(source, out, dtype)
    return out.read_bytes()


def exported(
    source: Path, out: Path, dtype: str, ops: FileOps | None = None, overwrite: bool = False
) -> None:
    store, dense = ("mxfp4", "q8_0") if dtype == "quantised" else ("keep", "keep")
    export_gguf(source, out, store=store, dense=dense, tokenizer=False, overwrite=overwrite, ops=ops)


def attempt(
    source: Path, out: Path, dtype: str, ops: FileOps | None = None, overwrite: bool = False
) -> MoeSurgeryError | None:
    """Export with `ops`; the error, if any. No descriptor, thread or sibling of `out` may stay."""
    before = open_files(source, out.parent), threading.active_count()
    error: MoeSurgeryError | None = None
    try:
        exported(source, out, dtype, ops, overwrite)
    except MoeSurgeryError as caught:
        error = caught
        assert "\n" not in str(error)
    assert (open_files(source, out.parent), threading.active_count()) == before
    assert siblings(out) == []
    return error


@pytest.mark.parametrize("forever", [False, True], ids=["once", "from-then-on"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_call_that_fails(
    source: Path, dtype: str, expected: bytes, tmp_path: Path, kind: str, forever: bool
) -> None:
    error: MoeSurgeryError | None = None
    with untouched(source):
        for number, (ops, expected_error) in enumerate(each_failure(kind, forever)):
            out = tmp_path / f"out-{number}.gguf"
            error = attempt(source, out, dtype, ops)
            if out.exists():
                assert out.read_bytes() == expected
                out.unlink()
            else:
                assert type(error) is expected_error
    assert error is None


@pytest.mark.parametrize("some", [lambda n: -(-n // 2), lambda n: min(n, 4097)])
def test_short_reads_and_writes_are_continued(
    source: Path, dtype: str, expected: bytes, tmp_path: Path, some: Callable[[int], int]
) -> None:
    assert attempt(source, tmp_path / "out.gguf", dtype, ShortOps(some)) is None
    assert (tmp_path / "out.gguf").read_bytes() == expected


def test_failed_flush_leaves_what_was_there(source: Path, dtype: str, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("keep me")
    for kind in ("pwrite", "fsync", "rename"):
        error = attempt(source, out, dtype, FaultyOps(kind, 1, errno.EIO), overwrite=True)
        assert type(error) is OutputError
        assert str(out) in str(error)
        assert out.read_text() == "keep me"


class Meddling(FileOps):
    """Does something at the first write."""

    def __init__(self, meddle: Callable[[], object]) -> None:
        self._meddle: Callable[[], object] | None = meddle

    def pwrite(self, fd: int, data: memoryview | bytes, offset: int) -> int:
        meddle, self._meddle = self._meddle, None
        if meddle:
            meddle()
        return super().pwrite(fd, data, offset)


@pytest.mark.parametrize("how", ["cut", "written to", "replaced"])
def test_a_source_that_changes_during_the_run_is_refused(dtype: str, tmp_path: Path, how: str) -> None:
    layout = "mxfp4" if dtype == "mxfp4" else "bf16"
    source = write_checkpoint(tmp_path / "source", layout=layout, shards=2)
    shard = source / "model-00002-of-00002.safetensors"

    def meddle() -> None:
        if how == "cut":
            os.truncate(shard, shard.stat().st_size - 1)
        elif how == "written to":
            os.utime(shard)
        else:
            content = shard.read_bytes()
            shard.unlink()
            shard.write_bytes(content)

    error = attempt(source, tmp_path / "out.gguf", dtype, Meddling(meddle))
    assert type(error) is InvalidInputError
    assert str(shard) in str(error)
    assert not (tmp_path / "out.gguf").exists()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source")


def test_an_existing_file_is_replaced_only_when_asked(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert attempt(small, out, "mxfp4") is None
    content = out.read_bytes()
    out.write_text("keep me")
    error = attempt(small, out, "mxfp4")
    assert type(error) is OutputError
    assert "exists; choose another name, or pass `overwrite=True` to replace it" in str(error)
    assert out.read_text() == "keep me"
    assert attempt(small, out, "mxfp4", overwrite=True) is None
    assert out.read_bytes() == content


def test_what_is_no_regular_file_is_never_replaced(small: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "fifo")
    for name, kind in (("folder", UsageError), ("link", OutputError), ("fifo", OutputError)):
        for overwrite in (False, True):
            assert type(attempt(small, tmp_path / name, "mxfp4", overwrite=overwrite)) is kind
    assert (tmp_path / "link").is_symlink()


def test_a_place_in_the_source_is_refused(small: Path, tmp_path: Path) -> None:
    with untouched(small):
        for out in (small / "out.gguf", small / "config.json", small):
            assert type(attempt(small, out, "mxfp4", overwrite=True)) is UsageError
    (tmp_path / "link").symlink_to(small)
    assert type(attempt(small, tmp_path / "link" / "out.gguf", "mxfp4")) is UsageError
    with pytest.raises(OutputError, match="no such folder; create it first"):
        exported(small, tmp_path / "nowhere" / "out.gguf", "mxfp4")


def test_output_created_during_the_run_is_not_touched(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    error = attempt(small, out, "mxfp4", Meddling(lambda: out.write_text("keep me")))
    assert type(error) is OutputError
    assert "was created by another program during this run" in str(error)
    assert out.read_text() == "keep me"


def test_space_is_checked_before_the_first_byte(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    error = attempt(small, out, "mxfp4", SmallDisk(1000))
    assert type(error) is DiskFullError
    assert "1,000 free" in str(error)
    export_gguf(small, out, tokenizer=False, ignore_free_space=True, ops=SmallDisk(1000))
    assert out.exists()


def test_an_interrupt_leaves_nothing(small: Path, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        assert (progress.stage, progress.unit) == ("export", "bytes")
        if progress.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(small, tmp_path / "out.gguf", tokenizer=False, progress=interrupt)
    assert sorted(os.listdir(tmp_path)) == ["source"]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """140 MB."""
    shape = Shape(4, 16, 4, 1024, 1024, 16, 4, 64, 8192)
    return write_checkpoint(tmp_path_factory.mktemp("large") / "source", shape, shards=3)


def written(out: Path) -> int:
    """Bytes in the temporary file of `out`."""
    try:
        return out.with_name(f".{out.name}.tmp").stat().st_size
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_ended_by_a_signal_leaves_nothing_under_the_name(
    large: Path, tmp_path: Path, kind: signal.Signals
) -> None:
    out = tmp_path / "out.gguf"
    arguments = ("export", large, out, "--no-tokenizer", "--quiet")
    for _ in range(20):  # a run may end before the signal is sent
        process = start(*arguments)
        if wait_for(lambda: written(out) > 10_000_000, process):
            process.send_signal(kind)
        stopped = ended(process)
        if stopped.code != 0:
            break
        out.unlink()
    assert stopped.code == (130 if kind == signal.SIGINT else -kind)
    assert not out.exists()
    if kind == signal.SIGINT:
        assert stopped.error == "moe-surgery: interrupted"
        assert siblings(out) == []
    assert run(*arguments).code == 0  # and what a killed run left is not in the way
    assert siblings(out) == []
    assert out.stat().st_size > 100_000_000


def test_a_second_run_to_the_same_file_fails_at_once(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    arguments = ("export", large, out, "--no-tokenizer", "--quiet")
    process = start_stopped(r"\.gguf\.tmp$", 1, *arguments)
    second = run(*arguments, "--overwrite")
    assert second.code == 5
    assert second.error == f"moe-surgery: {out}: another run is writing it; wait for it to finish"
    process.send_signal(signal.SIGCONT)
    assert ended(process).code == 0
    assert out.exists()


PEAK = """
import sys
from moe_surgery import export_gguf
export_gguf(sys.argv[1], sys.argv[2], tokenizer=False)
status = open("/proc/self/status").read()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A file of 342 MB; Python and numpy take 40 MiB, buffers of four to eight workers the rest."""
    shape = Shape(2, 8, 4, 2880, 2880, 64, 8, 64, 2048)
    source = write_sparse_checkpoint(tmp_path / "in", shape)
    out = tmp_path / "out.gguf"
    done = subprocess.run(
        [sys.executable, "-c", PEAK, source, out], capture_output=True, text=True, check=True
    )
    assert out.stat().st_size > 200e6
    assert int(done.stdout) < 128 * 1024
