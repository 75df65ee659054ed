"""Sweeps: every variant is what `prune` makes, dense tensors are stored once, and nothing is done twice."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_surgery import plan_from_ranking, prune, sweep, verify
from moe_surgery.card.card import make_card
from moe_surgery.card.write import write_card
from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.errors import (
    CheckpointWarning,
    DiskFullError,
    InvalidInputError,
    OutputError,
    PlanMismatchError,
    UsageError,
    VerificationError,
)
from moe_surgery.families.identity import identity
from moe_surgery.pipeline.sweep.run import SweepResult
from moe_surgery.progress import Progress
from moe_surgery.quality.evaluation import Evaluation, ModelResult, Quality
from moe_surgery.selection.ranking import Ranking
from tests.support import per_expert
from tests.support.checkpoints import Shape, assert_same_tensors, load_tensors, write_checkpoint
from tests.support.command import call, contents, start_stopped, stop_with, untouched

SHAPE = Shape(layers=3, experts=8, top_k=2)
COUNTS = (2, 5, 8)


def ranking(seed: int, layers: int = 3, experts: int = 8, model_type: str | None = "gpt_oss") -> Ranking:
    shuffled = random.Random(seed)
    rows = tuple(tuple(shuffled.sample(range(experts), experts)) for _ in range(layers))
    return Ranking(experts, rows, model_type, provenance={"method": f"shuffled {seed}"})


RANKINGS = [("law", ranking(0)), ("math", ranking(1))]
NAMES = [f"{name}-{n}" for name in ("law", "math") for n in COUNTS]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("sweep") / "source", SHAPE, shards=2)


@pytest.fixture(scope="module")
def swept(source: Path) -> tuple[Path, SweepResult]:
    out = source.parent / "out"
    return out, sweep(source, out, RANKINGS, COUNTS)


@pytest.fixture
def copied(swept: tuple[Path, SweepResult], tmp_path: Path) -> Path:
    """The sweep's folder with its links, to be changed."""
    target = tmp_path / "out"
    subprocess.run(["cp", "-a", swept[0], target], check=True)
    return target


def dense_file(folder: Path) -> Path:
    return folder / "model-00001-of-00002.safetensors"


def disk_bytes(folder: Path) -> int:
    """As `du --apparent-size` counts: a file with several names once."""
    files = {(s.st_dev, s.st_ino): s.st_size for f in folder.rglob("*") if f.is_file() for s in [f.stat()]}
    return sum(files.values())


# --- what it makes


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


# --- again


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


# --- the index


def evaluation(model: str, source: Path, kls: dict[tuple[int, int], float]) -> Evaluation:
    """By seed of the ranking and number of experts."""
    from moe_surgery import Checkpoint, identify_model

    with Checkpoint.open(source) as opened:
        digest = identity(opened, identify_model(opened))
    full = ModelResult("full", "full", (8,) * 3, 2, {"law": Quality(10, 1.0, 0.0, 1.0, (0.0,) * 3)})
    models = [
        ModelResult(
            f"{model}/whatever-{n}", "checkpoint", (n,) * 3, min(2, n),
            {"law": Quality(10, 1.0 + kl, kl, 0.5, (0.1,) * 3)},
            dict(plan_from_ranking(RANKINGS[seed][1], n).provenance),
        )
        for (seed, n), kl in kls.items()
    ]  # fmt: skip
    return Evaluation("gpt_oss", model, digest, 8, (full, *models))


def test_the_index_lists_all_variants_with_their_figures(source: Path, copied: Path, tmp_path: Path) -> None:
    (copied / "some.json").write_text(evaluation("x", source, {(0, 2): 0.25, (1, 5): 0.125}).to_json())
    given = tmp_path / "given.json"
    given.write_text(evaluation("x", source, {(1, 5): 0.5}).to_json())
    result = sweep(source, copied, RANKINGS, COUNTS, evaluations=[given])
    kls = {e.name: e.figures["law"]["kl"] for e in result.entries if e.figures}
    assert kls == {"law-2": 0.25, "math-5": 0.5}
    index = json.loads((copied / "index.json").read_text())
    assert {v["name"]: v["figures"]["law"]["kl"] for v in index["variants"] if v["figures"]} == kls
    for v in index["variants"]:
        assert v["nbytes"] == sum(f.stat().st_size for f in (copied / v["name"]).iterdir())
    rows = [line.split(" | ") for line in (copied / "index.md").read_text().splitlines() if "| [" in line]
    assert {r[0].removeprefix("| ").split("]")[0][1:]: r[9] for r in rows} == {
        name: {"law-2": "0.2500", "math-5": "0.5000"}.get(name, "\N{EN DASH}") for name in NAMES
    }
    page = (copied / "index.html").read_text()
    assert all(f'href="{name}/"' in page for name in NAMES)
    assert "http:" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in page
    # Figures stay when the sweep goes on without the files.
    (copied / "some.json").unlink()
    assert sweep(source, copied, RANKINGS, COUNTS).entries == result.entries


def test_an_evaluation_of_another_model_is_refused_where_it_is_named(source: Path, copied: Path) -> None:
    other = evaluation("x", source, {})
    text = other.to_json().replace(other.identity, "0" * 32)
    (copied / "other.json").write_text(text)
    sweep(source, copied, RANKINGS, COUNTS)
    with pytest.raises(PlanMismatchError, match=r"other\.json: is an evaluation of 'x'"):
        sweep(source, copied, RANKINGS, COUNTS, evaluations=[copied / "other.json"])


# --- refused


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rankings": []}, UsageError, "no ranking"),
        ({"experts": []}, UsageError, "`experts`: name at least one"),
        ({"experts": [0]}, UsageError, "`experts` 0: the model has 8 experts"),
        ({"experts": [9]}, UsageError, "`experts` 9: the model has 8 experts"),
        ({"rankings": [("a", RANKINGS[0][1]), ("a", RANKINGS[1][1])]}, UsageError, "two rankings"),
        ({"rankings": [("a/b", RANKINGS[0][1])]}, UsageError, "NAME=FILE"),
        ({"rankings": [("..", RANKINGS[0][1])]}, UsageError, "NAME=FILE"),
        (
            {"rankings": ["published:law"]},
            PlanMismatchError,
            "ranking law: the plan is for gpt_oss with 24 layers",
        ),
        ({"rankings": [("a", ranking(0, model_type="mixtral"))]}, PlanMismatchError, "ranking a: "),
        ({"store": "q4"}, UsageError, "`store` q4"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_written(
    source: Path, tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"rankings": RANKINGS, "experts": COUNTS, **change}
    with pytest.raises(error, match=message):
        sweep(source, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_folders_that_are_in_the_way_are_named_and_stay(source: Path, tmp_path: Path, copied: Path) -> None:
    with untouched(source):
        for out in (source, source / "out", source.parent):
            with pytest.raises(UsageError, match="source checkpoint"):
                sweep(source, out, RANKINGS, COUNTS)
        file = tmp_path / "file"
        file.write_text("x")
        with pytest.raises(OutputError, match="is not a folder"):
            sweep(source, file, RANKINGS, COUNTS)
        with pytest.raises(OutputError, match="no such folder"):
            sweep(source, tmp_path / "no" / "out", RANKINGS, COUNTS)
        (tmp_path / "other" / "math-2").mkdir(parents=True)
        with pytest.raises(OutputError, match=r"math-2 is in the way"):
            sweep(source, tmp_path / "other", RANKINGS, COUNTS)
        assert os.listdir(tmp_path / "other") == ["math-2"]
        with pytest.raises(OutputError, match=r"law-2: holds another checkpoint than this sweep would write"):
            sweep(source, copied, [("law", ranking(7))], COUNTS)
        (copied / "index.json").write_text("{}")
        with pytest.raises(InvalidInputError, match="not the index of a sweep"):
            sweep(source, copied, RANKINGS, COUNTS)


def test_a_disk_that_is_too_small_is_known_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    class Small(FileOps):
        def free_bytes(self, path: object) -> int:
            return 100_000

    with pytest.raises(DiskFullError, match="needs"):
        sweep(source, tmp_path / "out", RANKINGS, COUNTS, ops=Small())
    assert not os.listdir(tmp_path / "out")


def test_a_file_system_without_links_says_what_to_do(source: Path, tmp_path: Path) -> None:
    class Unlinked(FileOps):
        def link(self, old: object, new: object) -> None:
            raise OSError(95, "Operation not supported")

        def clone_range(self, *_: object) -> None:
            raise OSError(95, "Operation not supported")

    with pytest.raises(OutputError, match=r"neither by reflink nor by hard link.*`share=False`"):
        sweep(source, tmp_path / "out", RANKINGS, COUNTS, ops=Unlinked())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["index.json", "law-2"]


def test_counts_that_the_router_cannot_use_are_left_out_and_named(tmp_path: Path) -> None:
    settings = per_expert.config(n_group=2, topk_group=1)
    source = per_expert.write(tmp_path / "source", per_expert.deepseek("bf16"), settings)
    made = replace(ranking(3, 3, per_expert.EXPERTS, "deepseek_v3"), layer_numbers=(1, 2, 3))
    with pytest.warns(CheckpointWarning, match="leaving out 3, 5 experts: "):
        result = sweep(source, tmp_path / "out", [("r", made)], [3, 4, 5, 6], dry_run=True)
    assert [v.experts for v in result.variants] == [4, 6]
    with pytest.raises(PlanMismatchError, match="`experts` 3, 5: "):
        sweep(source, tmp_path / "out", [("r", made)], [3, 5], dry_run=True)


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
