"""Output that does not fit, detected before or while writing: one line, and nothing is left behind."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..support.checkpoints import Shape, write_checkpoint
from ..support.command import Ended, assert_sound, contents, run, siblings, untouched

SHAPE = Shape(4, 16, 4, 256, 256, 8, 2, 32, 2048)  # 10 MB
Disk = Callable[[str], Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "source", SHAPE, shards=3)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Mounts a separate small file system; `options` are those of tmpfs."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("no mount command here")
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def ext4(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB that reports being full only when blocks are allocated."""
    image, folder = tmp_path / "ext4.img", tmp_path / "ext4"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(6 << 20)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", str(image)], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True, capture_output=True)
    except FileNotFoundError as error:
        pytest.skip(f"{error.filename} is not installed")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no loop mount here: {error.stderr.decode(errors='replace').strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def check_refused(ended: Ended, out: Path, why: str) -> None:
    assert ended.code == 6, ended.err
    assert why in ended.error
    assert str(out) in ended.error or f"/.{out.name}.partial-" in ended.error
    assert ended.out == ""
    assert not os.path.lexists(out)
    assert siblings(out) == []


def test_too_little_space_is_seen_before_the_first_byte(source: Path, disk: Disk) -> None:
    out = disk("size=4m") / "out"
    with untouched(source):
        ended = run("prune", source, out, "--keep", "all")
    check_refused(ended, out, "free some space, keep fewer experts, or pass --ignore-free-space")
    assert "bytes but its file system has 4,194,304 free" in ended.error
    assert os.listdir(out.parent) == []


@pytest.mark.parametrize("size", ["40k", "1m", "3m", "5m"])
@pytest.mark.parametrize("shard_size", ["5GB", "500kB"])
def test_space_that_runs_out_while_writing_leaves_nothing(
    source: Path, disk: Disk, size: str, shard_size: str
) -> None:
    out = disk(f"size={size}") / "out"
    with untouched(source):
        ended = run(
            "prune", source, out, "--keep", "all", "--ignore-free-space", "--max-shard-size", shard_size
        )
    check_refused(ended, out, "No space left on device; free some space and run again")
    assert os.listdir(out.parent) == []


def test_space_that_runs_out_on_a_disk_leaves_nothing(source: Path, ext4: Path) -> None:
    out = ext4 / "out"
    before = os.statvfs(ext4).f_bfree
    ended = run("prune", source, out, "--keep", "all", "--ignore-free-space")
    check_refused(ended, out, "No space left on device")
    assert os.statvfs(ext4).f_bfree == before


@pytest.mark.parametrize("inodes", [1, 2, 3, 4, 6])
def test_no_inode_left_is_a_full_disk(source: Path, disk: Disk, inodes: int) -> None:
    out = disk(f"size=100m,nr_inodes={inodes}") / "out"
    ended = run("prune", source, out, "--keep", "all")
    assert ended.code == 6
    assert "No space left on device" in ended.error
    assert os.listdir(out.parent) == []


def test_the_same_command_succeeds_once_there_is_space(source: Path, disk: Disk) -> None:
    out = disk("size=4m") / "out"
    assert run("prune", source, out, "--keep", "all", "--ignore-free-space").code == 6
    subprocess.run(["mount", "-o", "remount,size=64m", str(out.parent)], check=True)
    assert run("prune", source, out, "--keep", "all").code == 0
    assert_sound(out, source)
    assert siblings(out) == []


def test_full_disk_leaves_the_output_that_was_to_be_replaced(source: Path, disk: Disk) -> None:
    out = disk("size=9m") / "out"
    assert run("prune", source, out, "--keep", "0-7").code == 0
    with untouched(out):
        for more in ((), ("--ignore-free-space",)):
            ended = run("prune", source, out, "--keep", "all", "--overwrite", *more)
            assert ended.code == 6
            assert len(ended.err.splitlines()) == 1
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("limit", [10, 5000, 1_000_000, 3_000_001])
@pytest.mark.parametrize("dtype", ["keep", "bf16"])
def test_file_size_limit_is_met_like_a_full_disk(
    source: Path, tmp_path: Path, limit: int, dtype: str
) -> None:
    out = tmp_path / "out"

    def before() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    with untouched(source):
        ended = run("prune", source, out, "--keep", "0-11", "--store", dtype, before=before)
    check_refused(ended, out, "File too large")


def test_shards_below_the_file_size_limit_are_written(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def before() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))

    assert run("prune", source, out, "--keep", "all", "--max-shard-size", "1500kB", before=before).code == 0
    assert max(len((out / name).read_bytes()) for name in contents(out)) < 2_000_000
    assert_sound(out, source)
