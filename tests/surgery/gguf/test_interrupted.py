"""Runs that fail, are interrupted or killed: a GGUF file appears whole or not at all, and the next run resumes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.gguf.resolve import open_gguf
from moe_surgery.checkpoint.staging import Staging
from moe_surgery.engine.chunks import CHUNK_BYTES
from moe_surgery.errors import DiskFullError, InvalidInputError, MoeSurgeryError, OutputError
from moe_surgery.families.gguf import identify_gguf
from moe_surgery.pipeline.pruning import PruneResult
from moe_surgery.surgery.gguf.compiler import compile_gguf_prune
from moe_surgery.surgery.gguf.run import run_gguf_program
from moe_surgery.surgery.run import Outcome
from tests.support.command import PATIENCE, contents, siblings, untouched
from tests.support.faults import KINDS, ShortOps, SmallDisk, each_failure, open_files
from tests.support.gguf_slices import assert_pruned
from tests.support.raw_gguf import TinyMoe

from .models import pruned, rows

HALF = (1, 2, 5, 7)
KEPT = dict.fromkeys(range(3), HALF)
LARGE = TinyMoe(hidden=512, width=1024, expert_type="F16")
"""Of which half are 18 chunks."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyMoe().write(tmp_path_factory.mktemp("small") / "m.gguf")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return LARGE.write(tmp_path_factory.mktemp("large") / "m.gguf")


@pytest.fixture(scope="module")
def expected(large: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = pruned(large, tmp_path_factory.mktemp("expected") / "out.gguf", HALF).out
    assert_pruned(large, out, KEPT, 8)
    return out.read_bytes()


def options(kind: str) -> dict[str, object]:
    return {"one file": {}, "set": {"max_shard_size": 20_000}, "manifest": {"manifest": True}}[kind]


def attempt(
    source: Path, out: Path, ops: FileOps, kind: str, **more: object
) -> PruneResult | MoeSurgeryError:
    """Prune with `ops`. No descriptor, thread or sibling of `out` may stay."""
    before = open_files(source.parent, out.parent), threading.active_count()
    result: PruneResult | MoeSurgeryError
    try:
        result = pruned(source, out, HALF, ops=ops, **options(kind), **more)
    except MoeSurgeryError as error:
        result = error
    assert "\n" not in str(result)
    assert (open_files(source.parent, out.parent), threading.active_count()) == before
    assert siblings(out) == []
    return result


@pytest.mark.parametrize("forever", [False, True], ids=["once", "from-then-on"])
@pytest.mark.parametrize("call", [k for k in KINDS if k not in ("exchange", "rename_new", "mkdir")])
@pytest.mark.parametrize("kind", ["one file", "set", "manifest"])
def test_each_call_that_fails(source: Path, tmp_path: Path, kind: str, call: str, forever: bool) -> None:
    with untouched(source.parent):
        for number, (ops, error) in enumerate(each_failure(call, forever)):
            folder = tmp_path / str(number)
            folder.mkdir()
            result = attempt(source, folder / "out.gguf", ops, kind)
            if isinstance(result, PruneResult):
                assert_pruned(source, result.out, KEPT, 8)
            elif left := sorted(p.name for p in folder.glob("out*")):
                assert call in (
                    "fsync_dir",
                    "close",
                    "unlink",
                    "open",
                    "fsync",
                )  # after the files had appeared
                assert_pruned(source, folder / left[0], KEPT, 8)
            else:
                assert type(result) is error
    assert isinstance(result, PruneResult)


@pytest.mark.parametrize("call", ["rename_new", "mkdir"])
@pytest.mark.parametrize("kind", ["one file", "set", "manifest"])
def test_failures_of_the_first_and_last_calls(source: Path, tmp_path: Path, kind: str, call: str) -> None:
    for number, (ops, error) in enumerate(each_failure(call, False)):
        folder = tmp_path / str(number)
        folder.mkdir()
        result = attempt(source, folder / "out.gguf", ops, kind)
        if isinstance(result, PruneResult):
            assert_pruned(source, result.out, KEPT, 8)
        else:
            assert type(result) is error
            assert list(folder.iterdir()) == []


@pytest.mark.parametrize("call", ["rename", "fsync_dir"])
@pytest.mark.parametrize("kind", ["one file", "set"])
def test_what_is_to_be_replaced_stays_until_all_is_there(
    source: Path, tmp_path: Path, kind: str, call: str
) -> None:
    for number, (ops, _) in enumerate(each_failure(call, False)):
        folder = tmp_path / str(number)
        folder.mkdir()
        pruned(source, folder / "out.gguf", (0, 3, 4, 6), **options(kind))
        old = contents(folder)
        result = attempt(source, folder / "out.gguf", ops, kind, overwrite=True)
        first = min(folder.glob("out*"))
        if contents(folder) != old:
            assert_pruned(source, first, KEPT, 8)
        else:
            assert not isinstance(result, PruneResult)


def test_short_reads_and_writes_are_continued(source: Path, tmp_path: Path) -> None:
    result = attempt(source, tmp_path / "out.gguf", ShortOps(lambda n: -(-n // 2)), "one file")
    assert isinstance(result, PruneResult)
    assert_pruned(source, result.out, KEPT, 8)


class Meddling(FileOps):
    """Does something before the first write."""

    def __init__(self, meddle: Callable[[], object]) -> None:
        self._meddle = meddle

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        super().mkdir(path)
        self._meddle()


@pytest.mark.parametrize("how", ["cut", "touched", "longer", "gone"])
def test_a_source_that_changes_is_refused(tmp_path: Path, how: str) -> None:
    source = TinyMoe().write(tmp_path / "m.gguf")
    size = source.stat().st_size
    meddle: dict[str, Callable[[], object]] = {
        "cut": lambda: os.truncate(source, size // 2),
        "touched": lambda: os.utime(source, ns=(0, 0)),
        "longer": lambda: os.truncate(source, size + 1),
        "gone": source.unlink,
    }
    error = attempt(source, tmp_path / "out.gguf", Meddling(meddle[how]), "one file")
    assert type(error) is (OutputError if how == "gone" else InvalidInputError)
    assert str(source) in str(error)
    assert not (tmp_path / "out.gguf").exists()


def test_the_space_is_checked_before_the_first_byte(source: Path, tmp_path: Path) -> None:
    needed = pruned(source, tmp_path / "out.gguf", HALF, dry_run=True).program.nbytes
    error = attempt(source, tmp_path / "out.gguf", SmallDisk(needed - 1), "one file")
    assert isinstance(error, DiskFullError)
    assert f"needs {needed:,} bytes" in str(error)
    assert isinstance(attempt(source, tmp_path / "out.gguf", SmallDisk(needed), "one file"), PruneResult)


def test_two_runs_at_a_time(source: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    class Second(FileOps):
        def mkdir(self, path: str | os.PathLike[str]) -> None:
            super().mkdir(path)
            with pytest.raises(OutputError) as caught:
                pruned(source, tmp_path / "out.gguf", HALF)
            refused.append(str(caught.value))

    pruned(source, tmp_path / "out.gguf", HALF, ops=Second())
    assert len(refused) == 1
    assert "another run is writing it" in refused[0]


# --- resuming within a file


def run(
    source: Path, out: Path, ops: FileOps | None = None, progress: Callable[[int], None] | None = None
) -> Outcome:
    """Prune with a journal entry after every second chunk."""
    with open_gguf(source, ops) as model:
        spec = identify_gguf(model)
        program = compile_gguf_prune(model, spec, rows(HALF)(spec), name=out.name)
        return run_gguf_program(program, model, out, ops=ops, progress=progress, segment=2 * CHUNK_BYTES)


class Counting(FileOps):
    """Counts bytes written; interrupts the run where it writes from position `stop` of a file on."""

    def __init__(self, stop: int | None = None) -> None:
        self.written = 0
        self._stop = stop
        self._lock = threading.Lock()

    def pwrite(self, fd: int, data: memoryview | bytes, offset: int) -> int:
        # By position, not by amount: two writers may be anywhere when so much has been written.
        if self._stop is not None and offset >= self._stop:
            raise KeyboardInterrupt
        done = super().pwrite(fd, data, offset)
        with self._lock:
            self.written += done
        return done


def partial(out: Path) -> Path:
    (folder,) = out.parent.glob(f".{out.name}.partial-*")
    return folder


@pytest.mark.parametrize("chunks", [1, 4, 5, 11, 17])
def test_an_interrupted_run_resumes_within_the_file(
    large: Path, expected: bytes, tmp_path: Path, chunks: int
) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        run(large, out, Counting(chunks * CHUNK_BYTES))
    assert not out.exists()
    ops, seen = Counting(), 0

    def progress(nbytes: int) -> None:
        nonlocal seen
        seen += nbytes

    outcome = run(large, out, ops, progress)
    assert out.read_bytes() == expected
    assert seen == len(expected)
    whole = chunks // 2 * 2 * CHUNK_BYTES
    # What was written before the interrupt may be journalled up to the last whole segment, no further.
    assert outcome.bytes_resumed <= whole
    assert outcome.bytes_resumed >= whole - 2 * CHUNK_BYTES
    assert outcome.bytes_written == len(expected) - outcome.bytes_resumed
    assert ops.written < outcome.bytes_written + CHUNK_BYTES  # journal and manifest besides
    assert sorted(os.listdir(tmp_path)) == ["out.gguf"]


def test_a_disk_that_is_too_full_does_not_cost_what_is_written(
    large: Path, expected: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        run(large, out, Counting(9 * CHUNK_BYTES))
    begun = partial(out) / ".out.gguf.tmp"
    os.truncate(begun, 9 * CHUNK_BYTES)  # without the space that was reserved for the rest
    needed = len(expected) - begun.stat().st_blocks * 512
    for free in (0, needed - 1):
        with pytest.raises(DiskFullError):
            run(large, out, SmallDisk(free))
    assert run(large, out, SmallDisk(needed)).bytes_resumed >= 6 * CHUNK_BYTES
    assert out.read_bytes() == expected


@pytest.mark.parametrize("damage", ["flip", "cut", "journal"])
def test_a_damaged_beginning_is_written_again(
    large: Path, expected: bytes, tmp_path: Path, damage: str
) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        run(large, out, Counting(9 * CHUNK_BYTES))
    begun = partial(out) / ".out.gguf.tmp"
    if damage == "flip":
        with begun.open("r+b") as file:
            file.seek(CHUNK_BYTES + 5)
            byte = file.read(1)
            file.seek(CHUNK_BYTES + 5)
            file.write(bytes([byte[0] ^ 1]))
    elif damage == "cut":
        os.truncate(begun, CHUNK_BYTES)
    else:
        journal = partial(out) / ".journal"
        journal.write_bytes(journal.read_bytes()[:-7])
    outcome = run(large, out)
    assert out.read_bytes() == expected
    assert (outcome.bytes_resumed > 0) == (damage == "journal")


def test_another_plan_does_not_resume(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        run(large, out, Counting(9 * CHUNK_BYTES))
    result = pruned(large, out, (0, 1))
    assert result.outcome is not None
    assert result.outcome.bytes_resumed == 0
    assert [p.name for p in result.stale] == [partial(out).name]


_CHILD = """
import sys
from pathlib import Path
from tests.surgery.gguf.test_interrupted import run
run(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("begun", [0, 3, 9])
def test_a_killed_run_resumes(large: Path, expected: bytes, tmp_path: Path, begun: int) -> None:
    out = tmp_path / "out.gguf"
    root = Path(__file__).parents[3]
    child = subprocess.Popen([sys.executable, "-c", _CHILD, large, out], cwd=root)
    try:
        while child.poll() is None and _written(out) < begun * CHUNK_BYTES:
            time.sleep(0.0005)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait(PATIENCE)
    assert not out.exists() or out.read_bytes() == expected
    if not out.exists():
        run(large, out)
    assert out.read_bytes() == expected


def _written(out: Path) -> int:
    try:
        return (partial(out) / ".out.gguf.tmp").stat().st_blocks * 512
    except (OSError, ValueError):
        return 0


class Killed(BaseException):
    pass


class Killing(FileOps):
    """Ends the run before the rename number `at`, and every system call after it, as a kill would."""

    def __init__(self, at: int) -> None:
        self._left = at

    def _check(self) -> None:
        if self._left <= 0:
            raise Killed

    def rename(self, old: str | os.PathLike[str], new: str | os.PathLike[str]) -> None:
        self._left -= 1
        self._check()
        super().rename(old, new)

    def rename_new(self, old: str | os.PathLike[str], new: str | os.PathLike[str]) -> None:
        self._left -= 1
        self._check()
        super().rename_new(old, new)


@pytest.mark.parametrize("kind", ["one file", "set", "manifest"])
def test_a_run_killed_at_any_rename_can_be_repeated(
    source: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A kill undoes nothing.
    monkeypatch.setattr(Staging, "_take_back", lambda *_: None)
    for at in range(1, 100):
        folder = tmp_path / str(at)
        folder.mkdir()
        try:
            pruned(source, folder / "out.gguf", HALF, ops=Killing(at), **options(kind))
        except Killed:
            firsts = [p for p in folder.glob("out*.gguf") if p.name in ("out.gguf",) or "-00001-" in p.name]
            assert firsts == []
            result = pruned(source, folder / "out.gguf", HALF, **options(kind))
            assert_pruned(source, result.out, KEPT, 8)
            assert siblings(folder / "out.gguf") == []
        else:
            assert at > 1
            return
    pytest.fail("the run makes no end of renames")


def test_errors_name_the_reason(source: Path, tmp_path: Path) -> None:
    for ops, _ in each_failure("pwrite", True):
        error = attempt(source, tmp_path / "out.gguf", ops, "one file")
        if isinstance(error, PruneResult):
            return
        assert os.strerror(errno.EIO) in str(error) or "space" in str(error) or "quota" in str(error).lower()
        assert str(tmp_path) in str(error)
