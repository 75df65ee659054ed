"""An open checkpoint: tensors match the index, sources are only read, nothing is left open."""

from __future__ import annotations

import mmap
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.local_file import LocalFile
from moe_surgery.checkpoint.resolve import resolve
from moe_surgery.checkpoint.shard import Shard
from moe_surgery.errors import InvalidInputError, MoeSurgeryError, OutputError, UsageError

from ..support.checkpoints import INDEX, load_tensors, save_tensors, write_checkpoint
from ..support.command import untouched
from ..support.faults import ShortOps, open_files

ROUTER = "model.layers.1.mlp.router.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", shards=3)


def test_every_tensor_is_where_the_reference_reader_finds_it(folder: Path) -> None:
    expected = load_tensors(folder)
    with untouched(folder), Checkpoint.open(folder) as opened:
        assert sorted(opened.tensors) == sorted(expected)
        for name, ref in opened.tensors.items():
            buffer = bytearray(ref.nbytes)
            opened.shards[ref.shard].read_into(ref.offset, memoryview(buffer))
            assert bytes(buffer) == expected[name].tobytes()
            assert ref.shape == expected[name].shape
            assert bytes(opened.shards[ref.shard].region(ref.offset, ref.nbytes)) == bytes(buffer)
        assert opened.nbytes == sum(t.nbytes for t in expected.values())


def test_rows_of_a_tensor_are_its_slices(folder: Path) -> None:
    expected = load_tensors(folder)[ROUTER]
    with Checkpoint.open(folder) as opened:
        ref = opened.tensors[ROUTER].rows(1, 2)
        assert ref.shape == (2, *expected.shape[1:])
        got = bytes(opened.shards[ref.shard].region(ref.offset, ref.nbytes))
        assert got == expected[1:3].tobytes()


def test_nothing_stays_open_or_mapped(folder: Path) -> None:
    before = open_files(folder)
    with Checkpoint.open(folder) as opened:
        ref = opened.tensors[ROUTER]
        view = opened.shards[ref.shard].region(ref.offset, ref.nbytes)
        assert len(open_files(folder)) > len(before)
    assert len(view) == ref.nbytes  # a view outlives the checkpoint
    view.release()
    assert open_files(folder) == before
    opened.close()


@pytest.mark.parametrize("damage", ["shard", "index", "config", "missing", "duplicate"])
def test_checkpoint_that_is_refused_leaves_nothing_open(folder: Path, damage: str) -> None:
    last = sorted(folder.glob("*.safetensors"))[-1]
    if damage == "shard":
        os.truncate(last, 50)
    elif damage == "index":
        (folder / INDEX).write_text("{}")
    elif damage == "config":
        (folder / "config.json").write_text("[]")
    elif damage == "missing":
        last.unlink()
    else:
        (folder / INDEX).unlink()
        save_tensors(folder / "z.safetensors", {ROUTER: np.zeros((4, 64), np.uint16)})
    before = open_files(folder)
    with pytest.raises(MoeSurgeryError, match=str(folder)):
        Checkpoint.open(folder)
    assert open_files(folder) == before


def test_without_an_index_all_shards_count(folder: Path) -> None:
    names = sorted(load_tensors(folder))
    (folder / INDEX).unlink()
    with Checkpoint.open(folder) as opened:
        assert sorted(opened.tensors) == names
        assert opened.index is None


def test_one_file_stands_for_itself(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    save_tensors(folder / "other.safetensors", {"other": np.zeros(3, np.uint8)})
    with Checkpoint.open(folder / "model.safetensors") as opened:
        assert list(opened.shards) == ["model.safetensors"]
        assert opened.path == folder


def test_side_files_are_what_travels_along(folder: Path) -> None:
    for name in ("pytorch_model.bin", "model.gguf", ".hidden", "consolidated.pth", "model.onnx"):
        (folder / name).write_text("")
    (folder / "original").mkdir()
    (folder / "link.txt").symlink_to(folder / "README.md")
    os.mkfifo(folder / "pipe")
    with Checkpoint.open(folder) as opened:
        assert opened.side_files == (
            "README.md",
            "chat_template.jinja",
            "generation_config.json",
            "link.txt",
        )


def test_snapshot_of_links_is_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    """In the layout of the hub's cache."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(tmp_path / f"blob{number}")
        (snapshot / file.name).symlink_to(Path("..") / f"blob{number}")
    with Checkpoint.open(snapshot) as opened:
        assert len(opened.shards) == 3
        opened.check_unchanged()


# --- one shard


@pytest.fixture
def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def test_short_reads_are_continued(shard: Path) -> None:
    raw = shard.read_bytes()
    with Shard("x", LocalFile(shard, ShortOps(lambda n: min(n, 7)))) as opened:
        buffer = bytearray(len(raw))
        opened.read_into(0, memoryview(buffer))
    assert buffer == raw


def test_read_past_the_end_is_an_error(shard: Path) -> None:
    size = shard.stat().st_size
    with Shard("x", LocalFile(shard)) as opened:
        for read in (
            lambda: opened.read_into(size - 9, memoryview(bytearray(10))),
            lambda: opened.region(size - 9, 10),
        ):
            with pytest.raises(InvalidInputError, match=f"ends before byte {size + 1}"):
                read()


def test_shard_cut_after_it_was_opened_is_an_error_and_no_crash(shard: Path) -> None:
    size = shard.stat().st_size
    with Shard("x", LocalFile(shard)) as opened:
        opened.region(0, 100)
        os.truncate(shard, 1000)
        for read in (
            lambda: opened.read_into(0, memoryview(bytearray(size))),
            lambda: opened.region(0, size),
            opened.check_unchanged,
        ):
            with pytest.raises(InvalidInputError, match=r"truncated while being read|changed while"):
                read()
        assert bytes(opened.region(0, 8))


def test_released_window_can_be_had_again(shard: Path) -> None:
    raw = shard.read_bytes()
    with Shard("x", LocalFile(shard)) as opened:
        for offset in (0, 1, mmap.PAGESIZE - 1, len(raw) - 1):
            window = opened.region(offset, len(raw) - offset)
            opened.release(offset, len(raw) - offset)
            assert bytes(window) == raw[offset:]
            assert bytes(opened.region(offset, len(raw) - offset)) == raw[offset:]
        assert bytes(opened.region(len(raw), 0)) == b""


def test_check_sees_a_file_put_in_its_place(shard: Path) -> None:
    with Shard("x", LocalFile(shard)) as opened:
        opened.check_unchanged()
        shutil.copy2(shard, shard.with_name("copy"))
        shard.with_name("copy").rename(shard)
        with pytest.raises(InvalidInputError, match=f"{shard}: changed while it was being read"):
            opened.check_unchanged()
        shard.unlink()
        with pytest.raises(OutputError, match=f"{shard}: No such file"):
            opened.check_unchanged()


# --- what a checkpoint is called


def test_names_lead_to_their_places(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert resolve("model") == Path("model")
    assert resolve(folder) == folder
    assert resolve(next(folder.glob("*.safetensors"))).parent == folder
    with Checkpoint.open("example:tiny") as opened:
        assert opened.config["model_type"] == "gpt_oss"


def test_path_that_exists_wins_over_a_hub_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder.parent / "openai").mkdir()
    folder.rename(folder.parent / "openai" / "gpt-oss-20b")
    monkeypatch.chdir(folder.parent)
    assert resolve("openai/gpt-oss-20b") == Path("openai/gpt-oss-20b")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("example:", UsageError),
        ("example:../tiny", UsageError),
        ("config.json", UsageError),
        ("nowhere", OutputError),
        ("./no/where", OutputError),
        ("/no/where", OutputError),
        ("", UsageError),
        ("a\nb", OutputError),
    ],
)
def test_names_that_lead_nowhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: type[MoeSurgeryError]
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(error) as caught:
        Checkpoint.open(name)
    assert str(caught.value).isprintable()
