"""With reflinks, kept experts take no disk space and have the same bytes."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from moe_surgery import families
from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.fileops import UNSUPPORTED, FileOps
from moe_surgery.checkpoint.header import build_header
from moe_surgery.pipeline.pruning import prune
from moe_surgery.progress import Progress
from moe_surgery.selection.plan import plan_keeping
from moe_surgery.surgery.compiler import compile_program
from moe_surgery.surgery.run import run_program

from ..support.checkpoints import Shape, write_checkpoint
from ..support.command import assert_sound, contents, run, siblings, untouched

SHAPE = Shape(2, 8, 2, 512, 512, 4, 2, 8, 64)
KEPT = [0, 2, 3, 6]
MAKERS = {"xfs": ("320M", ["mkfs.xfs", "-q"]), "btrfs": ("128M", ["mkfs.btrfs", "-q"])}


class NoClone(FileOps):
    """A file system without reflinks."""

    def clone_range(self, source: int, source_offset: int, nbytes: int, target: int, offset: int) -> None:
        code = min(UNSUPPORTED)
        raise OSError(code, os.strerror(code))


@pytest.fixture(scope="module", params=MAKERS)
def disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small file system with reflinks."""
    size, maker = MAKERS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    image, mount_point = folder / "image", folder / "disk"
    mount_point.mkdir()
    with image.open("wb") as file:
        file.truncate(int(size[:-1]) << 20)
    if shutil.which(maker[0]) is None:
        pytest.skip(f"{maker[0]} is not installed")
    for command in ([*maker, str(image)], ["mount", "-o", "loop", str(image), str(mount_point)]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{command[0]}: {done.stderr.strip()}")
    yield mount_point
    subprocess.run(["umount", str(mount_point)], check=True)
    image.unlink()


@pytest.fixture(scope="module")
def source(disk: Path) -> Path:
    return write_checkpoint(disk / "source", SHAPE, shards=3)


def weights(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def test_kept_experts_share_their_extents_with_the_source(disk: Path, source: Path, tmp_path: Path) -> None:
    copied, shared = tmp_path / "copied", disk / "shared"
    with untouched(source):
        plain = prune(source, copied, lambda m: plan_keeping(KEPT, m))
        clone = prune(source, shared, lambda m: plan_keeping(KEPT, m))
    assert plain.outcome is not None
    assert clone.outcome is not None
    assert plain.outcome.bytes_shared == 0
    assert clone.outcome.bytes_shared > weights(shared) * 0.5
    assert contents(shared) == contents(copied)
    assert_sound(shared, source)
    assert siblings(shared) == []


def test_sharing_is_refused_without_harm(disk: Path, source: Path) -> None:
    result = prune(source, disk / "copied", lambda m: plan_keeping(KEPT, m), ops=NoClone())
    assert result.outcome is not None
    assert result.outcome.bytes_shared == 0
    assert_sound(disk / "copied", source)


def test_padding_of_the_header_is_what_makes_sharing_possible(disk: Path, source: Path) -> None:
    with Checkpoint.open(source) as opened:
        model = families.identify_model(opened)
        padded = compile_program(opened, model, plan_keeping(KEPT, model))
        shards = []
        for shard in padded.shards:
            described = [(t.name, t.dtype, t.shape) for t in shard.tensors]
            shortest = build_header(described, metadata={"format": "pt"}, pad_to=8)
            assert (len(shortest) - len(shard.header)) % 4096
            shards.append(replace(shard, header=shortest))
        unpadded = replace(padded, shards=tuple(shards))
        with_padding = run_program(padded, opened, disk / "padded")
        without = run_program(unpadded, opened, disk / "unpadded")
    assert with_padding.bytes_shared > without.bytes_shared * 2
    assert all(len(s.header) - len(u.header) < 4096 for s, u in zip(padded.shards, shards, strict=True))


def test_writing_to_the_output_leaves_the_source(disk: Path, source: Path) -> None:
    out = disk / "written"
    prune(source, out, lambda m: plan_keeping(KEPT, m))
    with untouched(source):
        for shard in out.glob("*.safetensors"):
            with shard.open("r+b") as file:
                file.write(b"\xff" * shard.stat().st_size)
            os.sync()


def test_small_shards_that_share_hold_the_same_bytes(disk: Path, source: Path) -> None:
    one, other = disk / "cut-shared", disk / "cut-copied"
    result = prune(source, one, lambda m: plan_keeping(KEPT, m), max_shard_size=600_000)
    prune(source, other, lambda m: plan_keeping(KEPT, m), max_shard_size=600_000, ops=NoClone())
    assert result.outcome is not None
    assert result.outcome.bytes_shared > 0
    assert contents(one) == contents(other)


def test_command_says_what_is_shared(disk: Path, source: Path) -> None:
    ended = run("prune", source, disk / "said", "--keep", "all")
    assert ended.code == 0
    assert "share their disk blocks with the source (reflink)" in ended.err


def test_interrupted_run_keeps_shards_that_share(disk: Path, source: Path) -> None:
    def progress(progress: Progress) -> None:
        if progress.done > 2_000_000:
            raise KeyboardInterrupt

    def job(**more: object) -> object:
        return prune(source, disk / "on", lambda m: plan_keeping(KEPT, m), max_shard_size=600_000, **more)  # type: ignore[arg-type]

    with pytest.raises(KeyboardInterrupt):
        job(progress=progress)
    job()
    assert_sound(disk / "on", source)
    assert siblings(disk / "on") == []
