"""Missing, added, edited and swapped files of a checkpoint, and the verify command."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_surgery.surgery.verify import verify_checkpoint
from tests.support.checkpoints import INDEX
from tests.support.command import call
from tests.surgery.verify.damage import (
    check_found,
    damaged,
    flip,
    header_of,
    problems,
    tensor_offsets,
)

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("size", [-1, 1, None])
def test_file_of_another_length_is_named(job: tuple[Path, Path], tmp_path: Path, size: int | None) -> None:
    for name in os.listdir(job[1]):
        out = tmp_path / name / "out"
        shutil.copytree(job[1], out)
        old = (out / name).stat().st_size
        os.truncate(out / name, 0 if size is None else old + size)
        check_found(out, name)
        if name != "surgery.json":
            assert any(f"{out / name}: " in p and f"expected {old}" in p for p in problems(out))


def test_missing_file_is_named(job: tuple[Path, Path], tmp_path: Path) -> None:
    for name in set(os.listdir(job[1])) - {"surgery.json"}:
        out = tmp_path / name / "out"
        shutil.copytree(job[1], out)
        (out / name).unlink()
        check_found(out, name)


def test_swapped_shards_are_found(out: Path) -> None:
    one, other = sorted(out.glob("*.safetensors"))[:2]
    one.rename(out / "aside")
    other.rename(one)
    (out / "aside").rename(other)
    result = problems(out)
    assert any(one.name in p for p in result)
    assert any(other.name in p for p in result)


@pytest.mark.parametrize("name", ["extra.safetensors", "model-00009-of-00009.safetensors"])
def test_extra_weights_are_a_problem(out: Path, name: str) -> None:
    shutil.copy(next(out.glob("*.safetensors")), out / name)
    check_found(out, name)


def test_extra_file_is_a_note(out: Path) -> None:
    (out / "notes.txt").write_text("mine")
    result = verify_checkpoint(out)
    assert result.ok
    assert result.notes == (f"{out / 'notes.txt'}: not listed in surgery.json",)


SIDE_EDITS: dict[str, Callable[[Path], object]] = {
    "README.md": lambda path: path.write_text("# Mine\n"),
    "README.source.md": lambda path: path.unlink(),
    "chat_template.jinja": lambda path: flip(path, 0, 1),
    "config.json": lambda path: path.write_text(path.read_text().replace("\n", "\r\n")),
    "generation_config.json": lambda path: path.write_text("{}"),
}


@pytest.mark.parametrize("against", [False, True], ids=["alone", "with source"])
@pytest.mark.parametrize("name", SIDE_EDITS)
def test_an_edited_side_file_is_listed_separately_from_weights(
    name: str, against: bool, source: Path, out: Path, capsys: Capture
) -> None:
    SIDE_EDITS[name](out / name)
    options = ["--source", source] if against else []
    ended = call(capsys, "verify", out, *options)
    assert (ended.code, ended.out) == (8, "")
    named, summary = ended.err.splitlines()
    assert named.startswith(f"moe-surgery: {out / name}: ")
    assert summary == (
        f"moe-surgery: {out}: the weights are intact, only {name} changed; --weights-only accepts that"
    )
    ended = call(capsys, "verify", out, "--weights-only", *options)
    assert ended.code == 0
    assert ended.out.startswith(f"{out}: OK (")
    assert ended.err.splitlines() == [named.replace("moe-surgery: ", "note: ", 1)]
    output = call(capsys, "verify", out, "--weights-only", "--json", *options).json()
    assert (output["ok"], output["problems"], output["side_files"], output["weights_ok"]) == (
        True,
        [],
        [name],
        True,
    )


def test_weights_only_still_finds_one_byte_in_every_tensor(out: Path, capsys: Capture) -> None:
    (out / "README.md").write_text("# Mine\n")
    for shard in sorted(out.glob("*.safetensors")):
        for tensor, offsets in tensor_offsets(shard):
            flip(shard, offsets[1], 1)
            result = verify_checkpoint(out, weights_only=True)
            assert (result.problems, result.weights_ok) == ((damaged(shard, tensor),), False)
            flip(shard, offsets[1], 1)
    shard = next(out.glob("*.safetensors"))
    flip(shard, shard.stat().st_size - 1, 1)
    ended = call(capsys, "verify", out, "--weights-only")
    assert ended.code == 8
    assert "the weights are intact" not in ended.err


def test_weights_only_still_checks_config_and_index_against_the_shards(out: Path) -> None:
    config = json.loads((out / "config.json").read_bytes())
    (out / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    assert not verify_checkpoint(out, weights_only=True).ok
    (out / "config.json").write_text(json.dumps(config))
    assert verify_checkpoint(out, weights_only=True).ok
    index = json.loads((out / INDEX).read_bytes())
    index["weight_map"].popitem()
    (out / INDEX).write_text(json.dumps(index))
    assert not verify_checkpoint(out, weights_only=True).ok


def test_files_of_git_and_the_hub_are_one_note(out: Path, capsys: Capture) -> None:
    (out / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    for folder in (".git", ".cache"):
        (out / folder).mkdir()
        (out / folder / "model.safetensors").write_text("x")
    for options in ([], ["--weights-only"], ["--structure-only"]):
        ended = call(capsys, "verify", out, *options)
        assert ended.code == 0
        assert ended.err.splitlines() == [
            f"note: {out}: .cache, .git, .gitattributes: hidden files, not part of the checkpoint"
        ]


@pytest.mark.parametrize("kind", ["fifo", "folder", "dangling link"])
def test_shard_that_is_not_a_regular_file_is_named(out: Path, kind: str) -> None:
    shard = next(out.glob("*.safetensors"))
    shard.unlink()
    if kind == "fifo":
        os.mkfifo(shard)
    elif kind == "folder":
        shard.mkdir()
    else:
        shard.symlink_to("nowhere")
    check_found(out, shard.name)


def test_all_problems_are_listed_not_only_the_first(out: Path) -> None:
    shards = sorted(out.glob("*.safetensors"))
    for shard in shards:
        flip(shard, shard.stat().st_size - 1, 1)
    flip(out / "chat_template.jinja", 0, 1)
    assert len(problems(out)) == len(shards) + 1


# --- the command


def test_command_names_every_problem_and_exits_8(capsys: Capture, out: Path) -> None:
    shard = sorted(out.glob("*.safetensors"))[-1]
    *_, last = header_of(shard).tensors
    flip(shard, shard.stat().st_size - 1, 1)
    flip(out / "config.json", 0, 1)
    ended = call(capsys, "verify", out)
    assert ended.code == 8
    lines = ended.err.splitlines()
    assert all(line.startswith(f"moe-surgery: {out}/") for line in lines)
    assert any(f"{shard}: tensor '{last}'" in line for line in lines)
    assert any("config.json" in line for line in lines)
    assert ended.out == ""


def test_command_prints_what_was_checked(capsys: Capture, out: Path, source: Path) -> None:
    ended = call(capsys, "verify", out, "--source", source)
    assert ended.code == 0
    assert ended.out.startswith(f"{out}: OK (")
    assert ended.err == ""
    result = call(capsys, "verify", out, "--json").json()
    assert result["ok"] is True
    assert result["problems"] == []


# --- without manifest


def test_checkpoint_without_manifest_needs_structure_only(capsys: Capture, source: Path) -> None:
    ended = call(capsys, "verify", source)
    assert ended.code == 5
    assert "surgery.json: not found" in ended.error
    assert "--structure-only" in ended.error
    ended = call(capsys, "verify", source, "--structure-only")
    assert ended.code == 0
    assert "structure only" in ended.out
    assert call(capsys, "verify", source, "--structure-only", "--source", source).code == 2
    assert call(capsys, "verify", source / "no").code == 5


def test_structure_only_detects_header_errors(capsys: Capture, out: Path) -> None:
    shard = next(out.glob("*.safetensors"))
    flip(shard, shard.stat().st_size - 1, 1)
    assert verify_checkpoint(out, structure_only=True).ok
    assert verify_checkpoint(out, structure_only=True).bytes_read == 0
    (out / "surgery.json").unlink()
    config = json.loads((out / "config.json").read_bytes())
    (out / "config.json").write_text(json.dumps(config | {"num_local_experts": 2}))
    ended = call(capsys, "verify", out, "--structure-only")
    assert ended.code == 8
    assert "shape" in ended.error
