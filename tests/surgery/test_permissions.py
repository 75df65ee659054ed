"""Files and folders without permission are reported; modes of the output follow the umask."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_surgery.pipeline.pruning import prune
from moe_surgery.selection.plan import plan_keeping

from ..support.checkpoints import write_checkpoint
from ..support.command import assert_sound, run

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "models" / "source", shards=2)


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    """A pruned checkpoint in several shards."""
    folder = tmp_path / "out"
    prune(source, folder, lambda m: plan_keeping([0, 2], m), max_shard_size=5000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def without_privilege() -> None:
    """Drop root's right to ignore file modes, in a child before it runs a command."""
    capbset_drop, dac_override, dac_read_search = 24, 1, 2  # linux/prctl.h, linux/capability.h
    for capability in (dac_override, dac_read_search):
        if ctypes.CDLL(None).prctl(capbset_drop, capability, 0, 0, 0):
            os._exit(99)


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A folder without write permission."""
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)


def test_folder_without_write_permission_is_named(source: Path, closed: Path) -> None:
    before = without_privilege if os.geteuid() == 0 else None
    ended = run("prune", source, closed / "out", "--keep", "0", before=before)
    if ended.code == 99:
        pytest.skip("privileges cannot be dropped here")
    assert ended.code == 5
    assert ended.error == f"moe-surgery: {closed}: no permission to write there"
    assert os.listdir(closed) == []


def test_shard_without_read_permission_is_named(source: Path, tmp_path: Path) -> None:
    shard = next(source.glob("*.safetensors"))
    shard.chmod(0)
    before = without_privilege if os.geteuid() == 0 else None
    ended = run("prune", source, tmp_path / "out", "--keep", "0", before=before)
    if ended.code == 99:
        pytest.skip("privileges cannot be dropped here")
    assert ended.code == 5
    assert ended.error == f"moe-surgery: {shard}: cannot open: Permission denied"
    assert os.listdir(tmp_path) == ["models"]


def test_manifest_without_read_permission_is_named(source: Path, out: Path) -> None:
    """It is not mistaken for a foreign folder that the user should delete."""
    mode = (out / "surgery.json").stat().st_mode
    (out / "surgery.json").chmod(0)
    before = without_privilege if os.geteuid() == 0 else None
    ended = run("prune", source, out, "--keep", "0", "--overwrite", before=before)
    (out / "surgery.json").chmod(mode)
    if ended.code == 99:
        pytest.skip("privileges cannot be dropped here")
    assert ended.code == 5
    assert ended.error == f"moe-surgery: {out / 'surgery.json'}: cannot open: Permission denied"
    assert_sound(out, source)


def test_immutable_folder_is_named(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "immutable"
    folder.mkdir()
    chattr = shutil.which("chattr")
    if chattr is None or subprocess.run([chattr, "+i", str(folder)], capture_output=True).returncode:
        pytest.skip("no immutable folders here")
    try:
        ended = run("prune", source, folder / "out", "--keep", "0")
    finally:
        subprocess.run([chattr, "-i", str(folder)], check=True)
    assert ended.code == 5
    assert ended.error == f"moe-surgery: {folder}: no permission to write there"
    assert os.listdir(folder) == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_gives(source: Path, tmp_path: Path, umask: int) -> None:
    out = tmp_path / "out"

    def before() -> None:
        os.umask(umask)

    assert run("prune", source, out, "--keep", "0", before=before).code == 0
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {f.stat().st_mode & 0o777 for f in out.iterdir()} == {0o666 & ~umask}


def test_read_only_source_is_enough(source: Path, tmp_path: Path) -> None:
    for file in source.iterdir():
        file.chmod(0o444)
    source.chmod(0o555)
    before = without_privilege if os.geteuid() == 0 else None
    ended = run("prune", source, tmp_path / "out", "--keep", "0", before=before)
    source.chmod(0o755)
    if ended.code == 99:
        pytest.skip("privileges cannot be dropped here")
    assert ended.code == 0
    assert_sound(tmp_path / "out", source)
