"""Malformed shards and indexes through the command line: one line naming the file, the exit code, no output."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tests.support.checkpoints import (
    INDEX,
    load_tensors,
    save_tensors,
    write_checkpoint,
)
from tests.support.command import assert_sound, call
from tests.surgery.refusals import (
    BLOCKS,
    FIRST,
    ROUTER,
    SCALES,
    SECOND,
    edit,
    home,
    other,
    refused,
    shard_tensors,
)

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", shards=2)


def test_missing_shard_is_named(capsys: Capture, source: Path) -> None:
    (source / SECOND).unlink()
    refused(capsys, 5, str(source / SECOND), "listed in", "missing (1 of 2 shards)", source=source)


def test_tensor_missing_from_its_shard_is_named(capsys: Capture, source: Path) -> None:
    shard = home(source, ROUTER)
    tensors = shard_tensors(source, shard)
    del tensors[ROUTER]
    save_tensors(source / shard, tensors)
    refused(capsys, 3, str(source / shard), f"tensor '{ROUTER}' is missing", source=source)


@pytest.mark.parametrize(
    "tensor", [ROUTER, BLOCKS, SCALES, "lm_head.weight", "model.layers.1.self_attn.sinks"]
)
def test_tensor_missing_everywhere_is_named(capsys: Capture, tmp_path: Path, tensor: str) -> None:
    source = write_checkpoint(tmp_path / "source", shards=2, edit_tensors=lambda t: t.pop(tensor))
    refused(capsys, 3, str(source), f"{tensor!r} is missing", source=source)


def test_layer_missing_everywhere_is_named(capsys: Capture, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", edit_config=lambda c: c.update(num_hidden_layers=3))
    refused(capsys, 3, "model.layers.2.", "is missing", source=source)


def test_layer_too_many_is_named(capsys: Capture, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", edit_config=lambda c: c.update(num_hidden_layers=1))
    refused(capsys, 3, "model.safetensors", "model.layers.1.", "unexpected tensors", source=source)


def test_index_that_names_an_absent_tensor(capsys: Capture, source: Path) -> None:
    edit(source / INDEX, lambda i: i["weight_map"].update({"model.extra": FIRST}))
    refused(capsys, 3, str(source / FIRST), "tensor 'model.extra' is missing", source=source)


def test_index_that_names_the_wrong_shard(capsys: Capture, source: Path) -> None:
    shard = home(source, ROUTER)
    edit(source / INDEX, lambda i: i["weight_map"].update({ROUTER: other(shard)}))
    refused(capsys, 3, shard, ROUTER, f"says it is in {other(shard)}", source=source)


def test_tensor_in_two_shards(capsys: Capture, source: Path) -> None:
    shard = home(source, ROUTER)
    tensors = shard_tensors(source, other(shard)) | {ROUTER: load_tensors(source)[ROUTER]}
    save_tensors(source / other(shard), tensors)
    refused(capsys, 3, other(shard), ROUTER, f"says it is in {shard}", source=source)
    (source / INDEX).unlink()
    refused(capsys, 3, SECOND, f"tensor '{ROUTER}' is also in {FIRST}", source=source)


def test_model_safetensors_beside_an_index_is_refused_or_ignored(capsys: Capture, source: Path) -> None:
    out = source.parent / "out"
    save_tensors(source / "model.safetensors", {"extra": np.zeros(3, np.uint8)})
    refused(capsys, 3, str(source / "model.safetensors"), "--ignore-unlisted", source=source)
    assert call(capsys, "prune", source, out, "--keep", "0,1", "--ignore-unlisted").code == 0
    (source / "model.safetensors").unlink()
    assert_sound(out, source)


def test_unlisted_tensor_is_refused_or_ignored(capsys: Capture, source: Path) -> None:
    out = source.parent / "out"
    save_tensors(source / FIRST, shard_tensors(source, FIRST) | {"extra": np.zeros(3, np.uint8)})
    refused(capsys, 3, str(source / FIRST), "tensor 'extra'", "does not list it", source=source)
    assert call(capsys, "prune", source, out, "--keep", "0,1", "--ignore-unlisted").code == 0
    assert "extra" not in load_tensors(out)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[]", "must be a JSON object"),
        (b"{}", "weight_map is missing"),
        (b'{"weight_map": {"a": "../evil.safetensors"}}', "must be a plain file name"),
        (b'{"weight_map": {"a": "/etc/passwd"}}', "must be a plain file name"),
        (b'{"weight_map": {"a": "x.bin"}}', "does not end in .safetensors"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "duplicate key"),
    ],
)
def test_malformed_index_is_refused(capsys: Capture, source: Path, content: bytes, why: str) -> None:
    (source / INDEX).write_bytes(content)
    refused(capsys, 3, str(source / INDEX), why, source=source)


def test_folder_without_shards(capsys: Capture, source: Path) -> None:
    for file in (FIRST, SECOND, INDEX):
        (source / file).unlink()
    refused(capsys, 5, f"{source}: holds no .safetensors file", source=source)


@pytest.mark.parametrize("name", ["nothing", "no/such", "a/b/c/d"])
def test_missing_checkpoint_is_refused(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    ended = call(capsys, "prune", name, tmp_path / "out", "--keep", "0")
    assert ended.code == 5
    assert name in ended.error
    assert not (tmp_path / "out").exists()


def test_other_file_is_refused(capsys: Capture, source: Path) -> None:
    ended = call(capsys, "prune", source / "config.json", source.parent / "out", "--keep", "0")
    assert ended.code == 2
    assert "is the config.json of a model, not a checkpoint; pass its folder" in ended.error


def test_unknown_example(capsys: Capture, tmp_path: Path) -> None:
    ended = call(capsys, "prune", "example:huge", tmp_path / "out", "--keep", "0")
    assert ended.code == 2
    assert ended.error == "moe-surgery: example:huge: unknown example; known: tiny"


# --- bytes of a shard


def test_truncated_shard(capsys: Capture, source: Path) -> None:
    os.truncate(source / FIRST, (source / FIRST).stat().st_size - 1)
    refused(capsys, 3, str(source / FIRST), "truncated", source=source)


def test_shard_cut_in_its_header(capsys: Capture, source: Path) -> None:
    os.truncate(source / FIRST, 100)
    refused(capsys, 3, str(source / FIRST), "truncated", source=source)


def test_empty_shard(capsys: Capture, source: Path) -> None:
    os.truncate(source / FIRST, 0)
    refused(capsys, 3, str(source / FIRST), "0 bytes are too few", source=source)


def test_shard_with_bytes_after_the_last_tensor(capsys: Capture, source: Path) -> None:
    os.truncate(source / FIRST, (source / FIRST).stat().st_size + 7)
    refused(capsys, 3, str(source / FIRST), "7 bytes after the last tensor", source=source)


def test_large_file_pointer_in_place_of_a_shard(capsys: Capture, source: Path) -> None:
    (source / FIRST).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4792272488\n"
    )
    refused(capsys, 3, str(source / FIRST), "Git LFS pointer", "git lfs pull", source=source)


@pytest.mark.parametrize("kind", ["fifo", "directory", "dangling link", "link to a device"])
@pytest.mark.parametrize("file", [FIRST, INDEX, "config.json"])
def test_other_than_a_regular_file_is_refused(capsys: Capture, source: Path, kind: str, file: str) -> None:
    path = source / file
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    else:
        path.symlink_to("/dev/zero")
    refused(capsys, 5 if kind == "dangling link" else 3, str(path), source=source)


def test_unprintable_names_are_shown_escaped(capsys: Capture, tmp_path: Path) -> None:
    name = "\x1b[2Jevil\nname\u202e"
    source = write_checkpoint(
        tmp_path / "source", edit_tensors=lambda t: t.update({name: np.zeros(3, np.uint8)})
    )
    refused(capsys, 3, "\\x1b[2Jevil\\nname\\u202e", source=source)
