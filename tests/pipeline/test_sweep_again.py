"""A sweep repeated or interrupted does nothing twice, and a changed variant changes no other."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from moe_surgery import plan_from_ranking, prune, sweep, verify
from moe_surgery.card.card import make_card
from moe_surgery.card.write import write_card
from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.errors import (
    PlanMismatchError,
    VerificationError,
)
from moe_surgery.pipeline.sweep.run import SweepResult
from moe_surgery.progress import Progress
from tests.support.checkpoints import assert_same_tensors, load_tensors, write_checkpoint
from tests.support.command import contents, start_stopped, stop_with
from tests.support.sweeps import COUNTS, NAMES, RANKINGS, SHAPE, dense_file, ranking


class Counting(FileOps):
    """Counts the shards and manifests that are written, and the bytes that are read."""

    def __init__(self) -> None:
        self.published: list[str] = []

    def rename(self, old: Any, new: Any) -> None:
        self.published.append(Path(new).name)
        super().rename(old, new)


def test_what_is_finished_is_neither_made_nor_read_again(source: Path, copied: Path) -> None:
    before = contents(copied)
    # Damage that only reading would find: it is not read.
    damaged = copied / "math-5" / "model-00002-of-00002.safetensors"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    ops = Counting()
    result = sweep(source, copied, RANKINGS, COUNTS, ops=ops)
    assert (result.made, result.verified) == ((), ())
    assert set(ops.published) == {"index.json", "index.html", "index.md"}
    damaged.write_bytes(whole)
    assert contents(copied) == before


def test_a_removed_variant_is_made_again_and_a_new_one_added(source: Path, copied: Path) -> None:
    shutil.rmtree(copied / "law-2")
    result = sweep(source, copied, [*RANKINGS, ("safety", ranking(2))], [2])
    assert result.made == ("law-2", "safety-2")
    assert dense_file(copied / "safety-2").samefile(dense_file(copied / "math-8"))
    assert len(result.entries) == 7


def test_without_an_index_all_are_verified_again_but_not_made(source: Path, copied: Path) -> None:
    (copied / "index.json").unlink()
    result = sweep(source, copied, RANKINGS, COUNTS)
    assert (result.made, sorted(result.verified)) == ((), NAMES)


def test_an_interrupted_sweep_finishes_what_was_begun(
    source: Path, tmp_path: Path, swept: tuple[Path, SweepResult]
) -> None:
    out, files = tmp_path / "out", []
    for name, made in RANKINGS:
        file = tmp_path / f"{name}.json"
        file.write_text(made.to_json())
        files += ["--ranking", str(file)]
    arguments = ("sweep", source, out, *files, "--experts", "2,5,8")
    # Variants before the stop: one shared shard written, then experts; the fourth is begun.
    process = start_stopped(r"model-00002-of-00002\.safetensors\.tmp$", 4, *arguments)
    ended = stop_with(process, signal.SIGKILL)
    assert ended.code == -signal.SIGKILL
    partial = [p.name for p in out.iterdir() if ".partial-" in p.name]
    assert [name.split(".partial-")[0] for name in partial] == [".math-2"]
    verified = json.loads((out / "index.json").read_text())["variants"]
    assert [v["name"] for v in verified] == NAMES[:3]
    result = sweep(source, out, RANKINGS, COUNTS)
    assert (list(result.made), list(result.verified)) == (NAMES[3:], NAMES[3:])
    for name in NAMES:
        assert_same_tensors(load_tensors(out / name), load_tensors(swept[0] / name))
        assert verify(out / name).ok
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_progress_covers_the_whole_and_never_falls(source: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    sweep(source, tmp_path / "out", RANKINGS, COUNTS, progress=seen.append)
    assert {p.stage for p in seen} == {"sweep"}
    done = [p.done for p in seen]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, seen[0].total)
    assert seen[-1].note == "6 of 6 variants, math-8"


# --- links are safe


def test_a_new_card_or_an_overwritten_variant_changes_no_other(source: Path, copied: Path) -> None:
    before = contents(copied)
    write_card(copied / "law-2", make_card(copied / "law-2", license="mit"))
    # What `repair` and `prune --overwrite` do: the folder is replaced.
    prune(
        source, copied / "law-5", plan_from_ranking(RANKINGS[1][1], 3), overwrite=True, max_shard_size=10_000
    )
    after = contents(copied)
    changed = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
    assert {k.split("/")[0] for k in changed} == {"law-2", "law-5"}
    assert {k for k in changed if k.startswith("law-2")} == {"law-2/README.md", "law-2/surgery.json"}
    assert all(verify(copied / name).ok for name in NAMES)


def test_a_shared_file_cannot_be_overwritten_in_place(copied: Path) -> None:
    file = dense_file(copied / "law-2")
    if os.access(file, os.W_OK) and os.geteuid() == 0:
        assert file.stat().st_mode & 0o222 == 0
        return
    with pytest.raises(PermissionError):
        file.open("r+b")


def test_damage_in_a_shared_file_is_found_in_every_variant(copied: Path) -> None:
    file = dense_file(copied / "law-2")
    file.chmod(0o644)
    with file.open("r+b") as f:
        f.seek(-1, os.SEEK_END)
        last = f.read(1)
        f.seek(-1, os.SEEK_END)
        f.write(bytes([last[0] ^ 1]))
    assert [name for name in NAMES if verify(copied / name).ok] == []


def test_a_source_that_changed_since_is_compared_before_its_variants_are_shared(
    source: Path, copied: Path, tmp_path: Path
) -> None:
    other = write_checkpoint(tmp_path / "a" / "source", SHAPE, shards=2)  # the same bytes, other files
    assert sweep(other, copied, RANKINGS, (2, 3)).made == ("law-3", "math-3")

    def one_value(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1  # of bits: another bfloat16

    changed = write_checkpoint(tmp_path / "b" / "source", SHAPE, shards=2, edit_tensors=one_value)
    with pytest.raises(VerificationError, match=r"'model\.norm\.weight': differs .*: choose another folder"):
        sweep(changed, copied, RANKINGS, (2, 4))
    other_model = write_checkpoint(tmp_path / "c" / "source", SHAPE, shards=2, seed=1)
    with pytest.raises(PlanMismatchError, match="holds variants of another checkpoint"):
        sweep(other_model, copied, RANKINGS, (2, 4))
    assert not (copied / "law-4").exists()
