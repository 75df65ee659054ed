"""A hub id means the snapshot in the local hub cache; nothing is downloaded."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

import moe_surgery
from tests.support.checkpoints import Shape, assert_same_tensors, kept_tensors, load_tensors, write_checkpoint
from tests.support.command import assert_sound, run

pytest.importorskip("huggingface_hub")

REVISION = "0123456789abcdef0123456789abcdef01234567"
SHAPE = Shape(layers=1)


def cache(folder: Path, hub_id: str) -> dict[str, str]:
    """A hub cache holding a small checkpoint as `hub_id`, as huggingface_hub lays it out: the environment."""
    source = write_checkpoint(folder / "downloaded", SHAPE, shards=3)
    home = folder / "hub" / f"models--{hub_id.replace('/', '--')}"
    snapshot = home / "snapshots" / REVISION
    for part in (home / "blobs", home / "refs", snapshot):
        part.mkdir(parents=True)
    (home / "refs" / "main").write_text(REVISION)
    for file in source.iterdir():
        blob = sha256(file.read_bytes()).hexdigest()
        file.rename(home / "blobs" / blob)
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / blob)
    return {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}


def snapshot_of(folder: Path, hub_id: str) -> Path:
    return folder / "hub" / f"models--{hub_id.replace('/', '--')}" / "snapshots" / REVISION


@pytest.mark.parametrize("name", ["owner/model", "owner/model@main", f"owner/model@{REVISION}"])
def test_a_hub_id_is_found_with_or_without_a_revision(name: str, tmp_path: Path) -> None:
    ended = run("inspect", name, "--json", env=cache(tmp_path, "owner/model"))
    assert ended.code == 0, ended.err
    assert ended.json()["path"] == str(snapshot_of(tmp_path, "owner/model"))
    assert ended.json()["experts"] == 4


def test_a_model_of_the_cache_is_pruned_through_its_links_into_plain_files(tmp_path: Path) -> None:
    environment = cache(tmp_path, "owner/model.v1")
    out = tmp_path / "out"
    ended = run("prune", "owner/model.v1", out, "--keep", "1,3", env=environment)
    assert ended.code == 0, ended.err
    assert not any(file.is_symlink() for file in out.iterdir())
    source = snapshot_of(tmp_path, "owner/model.v1")
    assert_same_tensors(load_tensors(out), kept_tensors(load_tensors(source), [[1, 3]]))
    for name in ("generation_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert_sound(out, source)


@pytest.mark.parametrize(
    "name", ["owner/other", "owner/model@no-such-branch", "o--wner/mod--el", "a/" + "x" * 99]
)
def test_an_unknown_id_gives_one_line_that_says_how_to_get_it(name: str, tmp_path: Path) -> None:
    ended = run("inspect", name, env=cache(tmp_path, "owner/model"))
    assert (ended.code, ended.out) == (5, "")
    assert ended.error.startswith(f"moe-surgery: {name}: no such folder, and not in the local hub cache")
    assert "download it first: hf download" in ended.error


@pytest.mark.parametrize("revision", ["", "main", "refs/pr/3", REVISION])
def test_the_command_that_is_suggested_fetches_that_revision_without_other_formats(
    revision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parsed and filtered by huggingface_hub itself; the files are those of openai/gpt-oss-20b."""
    from huggingface_hub.cli import download
    from huggingface_hub.cli.hf import main
    from huggingface_hub.utils import filter_repo_objects

    name = f"openai/gpt-oss-20b@{revision}" if revision else "openai/gpt-oss-20b"
    ended = run("inspect", name, env=cache(tmp_path, "owner/model"))
    program, *arguments = shlex.split(ended.error.partition("download it first: ")[2])
    assert program == "hf"
    requested: dict[str, object] = {}

    def snapshot_download(**settings: object) -> str:
        requested.update(settings)
        return str(tmp_path)

    monkeypatch.setattr(download, "snapshot_download", snapshot_download)
    monkeypatch.setattr(sys, "argv", ["hf", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code in (0, None), capsys.readouterr().err
    assert (requested["repo_id"], requested["revision"]) == ("openai/gpt-oss-20b", revision or None)
    needed = [
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        "model-00000-of-00002.safetensors",
    ]
    others = ["original/model.safetensors", "original/config.json", "metal/model.bin"]
    ignored = requested["ignore_patterns"]
    assert list(filter_repo_objects(needed + others, ignore_patterns=ignored)) == needed  # type: ignore[arg-type]


def test_a_shard_missing_from_the_snapshot_is_named(tmp_path: Path) -> None:
    environment = cache(tmp_path, "owner/model")
    (snapshot_of(tmp_path, "owner/model") / "model-00002-of-00003.safetensors").unlink()
    ended = run("inspect", "owner/model", env=environment)
    assert ended.code == 5
    assert (
        "model-00002-of-00003.safetensors: listed in model.safetensors.index.json but missing" in ended.error
    )


def test_a_link_to_a_blob_that_is_not_there_is_named(tmp_path: Path) -> None:
    environment = cache(tmp_path, "owner/model")
    link = snapshot_of(tmp_path, "owner/model") / "model-00002-of-00003.safetensors"
    link.resolve().unlink()
    ended = run("inspect", "owner/model", env=environment)
    assert ended.code == 5
    assert f"{link}: is a symbolic link to a file that does not exist" in ended.error


def test_a_folder_of_that_name_wins(tmp_path: Path) -> None:
    environment = cache(tmp_path, "owner/model")
    folder = write_checkpoint(tmp_path / "owner" / "model", Shape(experts=7))
    ended = run("inspect", "owner/model", "--json", env=environment, before=lambda: os.chdir(tmp_path))
    assert ended.code == 0, ended.err
    assert ended.json()["experts"] == 7
    assert folder.is_dir()


def test_without_huggingface_hub_an_id_gives_one_line_that_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "from moe_surgery.cli import main; main(['inspect', 'owner/model'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(moe_surgery.__file__).parent.parent,
        check=False,
    )
    assert (done.returncode, done.stdout) == (5, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("moe-surgery: owner/model: no such folder; to look in the hub cache install")
    assert "moe-surgery[hub]" in line
