"""Every variant of a sweep is what `prune` makes, and dense tensors are stored once."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from moe_surgery import plan_from_ranking, prune, sweep, verify
from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.errors import (
    OutputError,
)
from moe_surgery.pipeline.sweep.run import SweepResult
from tests.support import per_expert
from tests.support.checkpoints import assert_same_tensors, load_tensors
from tests.support.command import call
from tests.support.sweeps import COUNTS, NAMES, RANKINGS, dense_file, disk_bytes, ranking


def test_every_variant_is_what_prune_makes_of_its_plan(
    swept: tuple[Path, SweepResult], source: Path, tmp_path: Path
) -> None:
    out, result = swept
    assert list(result.made) == list(result.verified) == NAMES
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == NAMES
    for name, made in RANKINGS:
        for n in COUNTS:
            folder = out / f"{name}-{n}"
            prune(source, tmp_path / folder.name, plan_from_ranking(made, n))
            assert_same_tensors(load_tensors(folder), load_tensors(tmp_path / folder.name))
            for same in ("config.json", "expert_mapping.json", "README.source.md"):
                assert (folder / same).read_bytes() == (tmp_path / folder.name / same).read_bytes()
            assert verify(folder, source=source).problems == ()
            assert f"with {n} of 8 experts" in (folder / "README.md").read_text() or n == 8


def test_dense_tensors_are_stored_once_and_read_only(swept: tuple[Path, SweepResult], source: Path) -> None:
    out, result = swept
    nbytes = {name: sum(f.stat().st_size for f in (out / name).iterdir()) for name in NAMES}
    dense = [dense_file(out / name) for name in NAMES]
    assert len({f.read_bytes() for f in dense}) == 1
    if len({f.stat().st_ino for f in dense}) == 1:  # hard links
        pages = sum((out / f"index.{kind}").stat().st_size for kind in ("html", "md", "json"))
        assert disk_bytes(out) == sum(nbytes.values()) - 5 * dense[0].stat().st_size + pages
        assert dense[0].stat().st_mode & 0o222 == 0
    assert result.costs.shared == 5 * dense[0].stat().st_size
    # The tensors in it are those that have no experts.
    names = set(load_tensors(source))
    assert {n for n in names if "mlp" not in n} == set(
        json.loads((out / "law-2" / "model.safetensors.index.json").read_text())["weight_map"]
    ) - {n for n in names if "mlp" in n}
    assert not any(os.stat(f).st_ino == dense[0].stat().st_ino for f in source.iterdir())


def test_the_costs_are_known_beforehand(source: Path, tmp_path: Path) -> None:
    planned = sweep(source, tmp_path / "out", RANKINGS, COUNTS, dry_run=True)
    assert not (tmp_path / "out").exists()
    assert (planned.made, planned.costs.variants) == ((), 6)
    sweep(source, tmp_path / "out", RANKINGS, COUNTS)
    written = disk_bytes(tmp_path / "out")
    manifests = sum(f.stat().st_size for f in (tmp_path / "out").rglob("surgery.json"))
    pages = sum((tmp_path / "out" / f"index.{kind}").stat().st_size for kind in ("html", "md", "json"))
    # Headers are padded, by less than a block.
    assert abs(written - manifests - pages - planned.costs.needed) < 6 * 2 * 4096
    again = sweep(source, tmp_path / "out", RANKINGS, COUNTS, dry_run=True)
    assert (again.costs.needed, again.costs.finished) == (0, 6)


def test_with_reflinks_the_files_are_independent(
    source: Path, tmp_path: Path, swept: tuple[Path, SweepResult]
) -> None:
    class Cloning(FileOps):
        """A file system with reflinks, as FICLONERANGE is documented: 0 bytes are those up to the end."""

        def clone_range(self, source: int, source_offset: int, nbytes: int, target: int, offset: int) -> None:
            whole = os.fstat(source).st_size - source_offset
            os.pwrite(target, os.pread(source, nbytes or whole, source_offset), offset)

        def link(self, old: object, new: object) -> None:
            raise AssertionError("a hard link where there are reflinks")

    out = tmp_path / "out"
    sweep(source, out, RANKINGS, COUNTS, ops=Cloning())
    for name in NAMES:
        assert verify(out / name, source=source).ok
        assert dense_file(out / name).read_bytes() == dense_file(swept[0] / name).read_bytes()
        assert dense_file(out / name).stat().st_nlink == 1
        assert dense_file(out / name).stat().st_mode & 0o200


def test_without_sharing_each_variant_is_a_checkpoint_of_its_own(source: Path, tmp_path: Path) -> None:
    result = sweep(source, tmp_path / "out", RANKINGS, [2], share=False)
    assert result.costs.shared == 0
    assert all(f.stat().st_nlink == 1 for f in (tmp_path / "out").rglob("*") if f.is_file())
    assert (tmp_path / "out" / "law-2" / "model.safetensors").exists()


def test_a_converted_sweep_names_its_format_and_shares_with_the_others(source: Path, copied: Path) -> None:
    result = sweep(source, copied, RANKINGS[:1], COUNTS[:1], store="bf16")
    assert result.made == ("law-2-bf16",)
    assert dense_file(copied / "law-2-bf16").samefile(dense_file(copied / "law-2"))
    assert "quantization_config" not in json.loads((copied / "law-2-bf16" / "config.json").read_text())
    listed = json.loads((copied / "index.json").read_text())["variants"]
    assert [v["name"] for v in listed] == [
        "law-2-bf16",
        "law-2",
        "law-5",
        "law-8",
        "math-2",
        "math-5",
        "math-8",
    ]


@pytest.mark.parametrize("mtp", [None, "drop"])
def test_experts_stored_one_by_one_with_layers_for_further_tokens(tmp_path: Path, mtp: str | None) -> None:
    tensors, settings = per_expert.deepseek("bf16", mtp=True), per_expert.config(mtp=True)
    source = per_expert.write(tmp_path / "source", tensors, settings, shards=3)
    made = replace(ranking(3, 3, per_expert.EXPERTS, "deepseek_v3"), layer_numbers=(1, 2, 3))
    result = sweep(source, tmp_path / "out", [("r", made)], [3, 5], mtp=mtp, max_shard_size=40_000)
    three, five = (tmp_path / "out" / v.name for v in result.variants)
    assert per_expert.read(three) != per_expert.read(five)
    for n, folder in ((3, three), (5, five)):
        plan = plan_from_ranking(made, n)
        prune(source, tmp_path / folder.name, plan, mtp=mtp)
        assert per_expert.read(folder) == per_expert.read(tmp_path / folder.name)
    linked = [f for f in three.glob("*.safetensors") if f.stat().st_nlink == 2]
    assert len(linked) > 1
    assert {f.stat().st_ino for f in linked} <= {f.stat().st_ino for f in five.iterdir()}
    assert (
        sweep(source, tmp_path / "out", [("r", made)], [3, 5], mtp=mtp, max_shard_size=40_000).verified == ()
    )
    other = None if mtp else "drop"
    with pytest.raises(OutputError, match="holds another checkpoint"):
        sweep(source, tmp_path / "out", [("r", made)], [3, 5], mtp=other)


# --- the command


def test_the_command_shows_costs_and_the_result(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("law.json").write_text(RANKINGS[0][1].to_json())
    command = (
        "sweep",
        source,
        "out",
        "--ranking",
        "law.json",
        "--ranking",
        "second=law.json",
        "--experts",
        "2-4,8",
    )
    planned = call(capsys, *command, "--dry-run")
    assert planned.code == 0, planned.err
    assert "8 variants of" in planned.out
    assert not Path("out").exists()
    ended = call(capsys, *command)
    assert ended.code == 0, ended.err
    assert "8 variants, 8 made and 8 verified now, 0 evaluated" in ended.out
    assert sorted(p for p in os.listdir("out") if "-" in p) == [
        f"{name}-{n}" for name in ("law", "second") for n in (2, 3, 4, 8)
    ]
    again = call(capsys, *command, "--json").json()
    assert (again["made"], again["bytes_needed"], len(again["index"])) == ([], 0, 8)
    bad = call(capsys, "sweep", source, "out", "--ranking", "law.json", "--experts", "2-x")
    assert bad.code == 2
    assert "is not a number of experts" in bad.err
