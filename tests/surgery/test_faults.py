"""Each system call of a run fails, once or from then on: published output is whole, the rest is removed."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.errors import DiskFullError, InvalidInputError, MoeSurgeryError, OutputError
from moe_surgery.pipeline.pruning import prune
from moe_surgery.progress import Progress
from moe_surgery.selection.plan import plan_keeping

from ..support import per_expert
from ..support.checkpoints import Shape, write_checkpoint
from ..support.command import assert_sound, contents, siblings, untouched
from ..support.faults import KINDS, FaultyOps, ShortOps, each_failure, open_files

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@pytest.fixture(scope="module", params=["keep", "bf16", "mxfp4", "per expert"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, dtype: str) -> Path:
    return written(tmp_path_factory.mktemp("model") / "source", dtype)


def written(folder: Path, dtype: str) -> Path:
    """The source for `dtype` in two shards; "per expert" is a model that stores each expert separately."""
    if dtype == "per expert":
        return per_expert.write(
            folder, per_expert.deepseek("fp8 block", mtp=True), per_expert.config(mtp=True), shards=2
        )
    return write_checkpoint(folder, layout="bf16" if dtype == "mxfp4" else "mxfp4", shards=2)


@pytest.fixture(scope="module")
def expected(source: Path, dtype: str) -> dict[str, bytes]:
    out = source.with_name("expected")
    pruned(source, out, dtype)
    return contents(out)


def pruned(source: Path, out: Path, dtype: str, ops: FileOps | None = None) -> None:
    """Prune to three or so shards."""
    store = "keep" if dtype == "per expert" else dtype
    size = 60_000 if dtype == "bf16" else 40_000 if dtype == "per expert" else 25_000
    prune(source, out, lambda m: plan_keeping([0, 1, 3], m), store=store, max_shard_size=size, ops=ops)


def attempt(source: Path, out: Path, dtype: str, ops: FileOps) -> MoeSurgeryError | None:
    """Prune with `ops`; the error, if any. No descriptor, thread or sibling of `out` may stay."""
    before = open_files(source, out.parent), threading.active_count()
    error: MoeSurgeryError | None = None
    try:
        pruned(source, out, dtype, ops)
    except MoeSurgeryError as caught:
        error = caught
        assert "\n" not in str(error)
    assert (open_files(source, out.parent), threading.active_count()) == before
    assert siblings(out) == []
    return error


@pytest.mark.parametrize("forever", [False, True], ids=["once", "from-then-on"])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "exchange"])
def test_each_call_that_fails(
    source: Path, dtype: str, expected: dict[str, bytes], tmp_path: Path, kind: str, forever: bool
) -> None:
    error: MoeSurgeryError | None = None
    with untouched(source):
        for number, (ops, expected_error) in enumerate(each_failure(kind, forever)):
            out = tmp_path / f"out-{number}"
            error = attempt(source, out, dtype, ops)
            if out.exists():
                assert contents(out) == expected
            else:
                assert type(error) is expected_error
    assert error is None
    assert_sound(out, source)


@pytest.mark.parametrize("code", [errno.EIO, *NO_SPACE])
@pytest.mark.parametrize("kind", ["open", "pwrite", "fsync", "close", "rename", "rename_new", "mkdir"])
def test_error_says_the_file_and_the_reason(
    source: Path, dtype: str, tmp_path: Path, kind: str, code: int
) -> None:
    error = attempt(source, tmp_path / "out", dtype, FaultyOps(kind, 1, code))
    assert type(error) is (DiskFullError if code in NO_SPACE else OutputError)
    assert str(tmp_path) in str(error)
    assert os.strerror(code) in str(error)
    assert error.exit_code == (6 if code in NO_SPACE else 5)


def test_failed_flush_is_never_tried_again(source: Path, dtype: str, tmp_path: Path) -> None:
    ops = FaultyOps("fsync", 1, errno.EIO)
    assert isinstance(attempt(source, tmp_path / "out", dtype, ops), OutputError)
    assert not (tmp_path / "out").exists()
    assert ops.calls["rename_new"] == 0


@pytest.mark.parametrize("some", [lambda n: 1, lambda n: -(-n // 2), lambda n: min(n, 4097)])
def test_short_reads_and_writes_are_continued(
    source: Path, dtype: str, expected: dict[str, bytes], tmp_path: Path, some: Callable[[int], int]
) -> None:
    assert attempt(source, tmp_path / "out", dtype, ShortOps(some)) is None
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("at", "name"), [(1, "config.json"), (2, "model.safetensors.index"), (3, "model-0000")]
)
def test_reads_of_a_failing_disk_name_the_file(source: Path, tmp_path: Path, at: int, name: str) -> None:
    error = attempt(source, tmp_path / "out", "keep", FaultyOps("pread_into", at, errno.EIO))
    assert type(error) is OutputError
    assert str(source / name) in str(error)
    assert "Input/output error" in str(error)


# --- a source that changes while it is read


class Meddling(FileOps):
    """Does something at the first write, when the source has been opened and its header read."""

    def __init__(self, meddle: Callable[[], object]) -> None:
        self._meddle: Callable[[], object] | None = meddle

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        super().mkdir(path)
        if self._meddle:
            self._meddle()


def changed(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")


def replaced(path: Path) -> None:
    content, stat = path.read_bytes(), path.stat()
    path.unlink()
    path.with_name("other").write_bytes(content)
    path.with_name("other").rename(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


MEDDLERS: dict[str, Callable[[Path], object]] = {
    "cut to half": lambda p: os.truncate(p, p.stat().st_size // 2),
    "cut by a byte": lambda p: os.truncate(p, p.stat().st_size - 1),
    "cut to nothing": lambda p: os.truncate(p, 0),
    "longer": lambda p: os.truncate(p, p.stat().st_size + 1),
    "written to": changed,
    "touched": lambda p: os.utime(p),
    "dated back": lambda p: os.utime(p, ns=(0, 0)),
    "replaced by a copy": replaced,
    "replaced by a link": lambda p: p.rename(p.with_name("kept")).with_name(p.name).symlink_to("nowhere"),
}


@pytest.mark.parametrize("how", MEDDLERS)
@pytest.mark.parametrize("dtype", ["keep", "bf16", "mxfp4", "per expert"])
def test_source_that_changes_during_the_run_is_refused(tmp_path: Path, how: str, dtype: str) -> None:
    source = written(tmp_path / "source", dtype)
    shard = source / "model-00002-of-00002.safetensors"
    error = attempt(source, tmp_path / "out", dtype, Meddling(lambda: MEDDLERS[how](shard)))
    assert not (tmp_path / "out").exists()
    assert type(error) is (OutputError if "link" in how else InvalidInputError)
    assert str(shard) in str(error)


def test_source_removed_during_the_run_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", shards=2)
    shard = source / "model-00001-of-00002.safetensors"
    error = attempt(source, tmp_path / "out", "keep", Meddling(shard.unlink))
    assert type(error) is OutputError
    assert str(shard) in str(error)
    assert not (tmp_path / "out").exists()


def test_side_file_removed_during_the_run_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    side = source / "chat_template.jinja"
    error = attempt(source, tmp_path / "out", "keep", Meddling(side.unlink))
    assert type(error) is OutputError
    assert str(side) in str(error)
    assert not (tmp_path / "out").exists()


def test_run_that_ends_with_an_unknown_error_leaves_nothing_either(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", Shape(layers=1))

    def fails(progress: Progress) -> None:
        if progress.done:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        prune(source, tmp_path / "out", lambda m: plan_keeping([0], m), progress=fails)
    assert sorted(os.listdir(tmp_path)) == ["source"]
