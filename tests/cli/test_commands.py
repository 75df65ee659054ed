"""What the commands print and write: results on stdout, remarks on stderr, JSON for programs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moe_surgery import load_plan
from tests.support.checkpoints import (
    Shape,
    assert_same_tensors,
    kept_tensors,
    load_config,
    load_tensors,
    write_checkpoint,
)
from tests.support.command import Ended, assert_sound, call, siblings, untouched

Capture = pytest.CaptureFixture[str]
TINY = "example:tiny"


def done(ended: Ended) -> Ended:
    assert ended.code == 0, ended.err
    return ended


# --- inspect


def test_inspect_shows_the_model_and_a_row_for_every_fourth_count(capsys: Capture) -> None:
    result = done(call(capsys, "inspect", TINY)).out
    assert "gpt-oss (gpt_oss, hub layout)" in result
    assert "32 in each of 4 layers, top-4, stored as MXFP4" in result
    rows = [line.split() for line in result.splitlines()]
    assert [int(r[0]) for r in rows if len(r) > 5 and r[0].isdigit()] == list(range(4, 33, 4))
    assert "most experts whose weights fit 8 GB: 32 in MXFP4, 32 in BF16" in result


@pytest.mark.parametrize(
    ("experts", "rows"),
    [
        (10, list(range(1, 11))),
        (30, [4, 8, 12, 16, 20, 24, 28, 30]),
        (100, [16, 32, 48, 64, 80, 96, 100]),
        (256, list(range(32, 257, 32))),
    ],
)
def test_inspect_shows_at_most_ten_counts_and_all_when_asked(
    tmp_path: Path, capsys: Capture, experts: int, rows: list[int]
) -> None:
    source = write_checkpoint(tmp_path / "in", Shape(layers=1, experts=experts, hidden=32))

    def counts(*options: str) -> list[int]:
        lines = done(call(capsys, "inspect", source, *options)).out.splitlines()
        return [int(r[0]) for r in map(str.split, lines) if len(r) > 5 and r[0].isdigit()]

    assert counts() == rows
    assert counts("--all-sizes") == list(range(1, experts + 1))


def test_inspect_in_json_holds_the_numbers(capsys: Capture) -> None:
    results = done(call(capsys, "inspect", TINY, "--json"))
    assert results.err == ""
    result = results.json()
    assert (result["experts"], result["layers"], result["top_k"], result["tensors"]) == (32, 4, 4, 79)
    assert len(result["sizes"]) == 32


def test_one_file_is_a_checkpoint_if_it_holds_the_whole_model(tmp_path: Path, capsys: Capture) -> None:
    source = write_checkpoint(tmp_path / "in")
    result = done(call(capsys, "inspect", source / "model.safetensors", "--json")).json()
    assert result["shards"] == {"model.safetensors": (source / "model.safetensors").stat().st_size}
    out = tmp_path / "out"
    done(call(capsys, "prune", source / "model.safetensors", out, "--keep", "2,0"))
    assert_same_tensors(load_tensors(out), kept_tensors(load_tensors(source), [[2, 0]] * 2))

    parts = write_checkpoint(tmp_path / "parts", shards=2)
    ended = call(capsys, "inspect", parts / "model-00001-of-00002.safetensors")
    assert ended.code == 3
    assert "is missing" in ended.error


# --- plan


PLANS = {
    "keep": ["--keep", "0,3,8-11", TINY],
    "keep all": ["--keep", "all", TINY],
    "random": ["--random", "-n", "5", "--seed", "3", TINY],
}


@pytest.mark.parametrize("case", PLANS)
def test_a_plan_goes_to_stdout_or_to_a_file_and_is_the_same(
    case: str, tmp_path: Path, capsys: Capture
) -> None:
    printed = done(call(capsys, "plan", *PLANS[case]))
    assert printed.err == ""
    file = tmp_path / "plan.json"
    written = done(call(capsys, "plan", *PLANS[case], "-o", file))
    assert file.read_text() == printed.out
    assert written.out == ""
    plan = load_plan(file)
    assert plan.as_dict() == printed.json()
    kept = f"keeps {plan.uniform_experts} of 32 experts in 4 layers"
    assert written.err == f"{file}: {kept}\n"
    result = done(call(capsys, "plan", *PLANS[case], "-o", file, "--json", "-q"))
    assert result.err == ""
    assert result.json() == {"output": str(file)} | plan.as_dict()


def test_a_plan_from_a_ranking_takes_the_model_type_from_where_it_is_said(
    tmp_path: Path, capsys: Capture
) -> None:
    source = write_checkpoint(tmp_path / "in", Shape(layers=2, experts=4))
    ranking = tmp_path / "r.json"
    ranking.write_text('{"layer_0": [3, 1, 0, 2], "layer_1": [2, 0, 3, 1]}')
    by_name = done(call(capsys, "plan", ranking, "-n", 2, "--model-type", "gpt_oss")).json()
    by_model = done(call(capsys, "plan", ranking, "-n", 2, source)).json()
    assert by_name == by_model
    assert by_name["layers"] == [[1, 3], [0, 2]]
    ordered = call(capsys, "plan", ranking, "-n", 2, source, "--order", "ranking")
    assert done(ordered).json()["layers"] == [[3, 1], [2, 0]]
    assert done(ordered).json()["provenance"]["ranking"] == "r.json"


# --- prune


def test_a_dry_run_tells_what_would_be_written_and_writes_nothing(tmp_path: Path, capsys: Capture) -> None:
    source = write_checkpoint(tmp_path / "in", shards=2)
    out = tmp_path / "out"
    arguments = ["prune", source, out, "--keep", "1,2", "--max-shard-size", "20kB"]
    with untouched(tmp_path):
        shown = done(call(capsys, *arguments, "--dry-run"))
        result = done(call(capsys, *arguments, "--dry-run", "--json")).json()
    assert shown.out.splitlines()[0] == f"would write {out}"
    assert result["outcome"] is None
    assert not out.exists()

    made = done(call(capsys, *arguments, "--json")).json()
    for key in ("shards", "bytes_read", "bytes_written", "side_files", "parameters", "top_k"):
        assert made[key] == result[key]
    assert {s["name"]: s["bytes_written"] for s in result["shards"]} == {
        file.name: file.stat().st_size for file in out.glob("*.safetensors")
    }
    assert {*result["side_files"], "surgery.json"} == {
        file.name for file in out.iterdir() if file.suffix != ".safetensors"
    }
    assert siblings(out) == []


def test_a_dry_run_says_as_well_what_stands_in_the_way(tmp_path: Path, capsys: Capture) -> None:
    source = write_checkpoint(tmp_path / "in")
    (tmp_path / "out").mkdir()
    ended = call(capsys, "prune", source, tmp_path / "out", "--keep", "0", "--dry-run")
    assert ended.code == 5
    assert "exists" in ended.error


def test_prune_reports_on_stdout_and_remarks_on_stderr(tmp_path: Path, capsys: Capture) -> None:
    source = write_checkpoint(tmp_path / "in", Shape(experts=8, top_k=4))
    ended = done(call(capsys, "prune", source, tmp_path / "a", "--keep", "0-2"))
    assert ended.out.startswith(f"{tmp_path}/a: 3 of 8 experts, top-3, ")
    assert "note: top-k 3 is not a power of two" in ended.err
    quiet = done(call(capsys, "prune", source, tmp_path / "b", "--keep", "0-2", "-q"))
    assert quiet.err == ""
    assert quiet.out.startswith(f"{tmp_path}/b: 3 of 8 experts")
    verbose = done(call(capsys, "prune", source, tmp_path / "c", "--keep", "0-2", "-v"))
    assert "reading " in verbose.err
    assert "reading " not in ended.err


@pytest.mark.parametrize("dtype", ["keep", "bf16", "mxfp4"])
def test_prune_in_json_tells_what_it_did(dtype: str, tmp_path: Path, capsys: Capture) -> None:
    source = write_checkpoint(tmp_path / "in", Shape(experts=8, top_k=4), "bf16")
    out = tmp_path / "out"
    ended = done(call(capsys, "prune", source, out, "--keep", "0-2", "--store", dtype, "--json"))
    result = ended.json()
    assert (result["output"], result["experts"], result["top_k"]) == (str(out), 3, 3)
    assert result["expert_storage"] == ("mxfp4" if dtype == "mxfp4" else "bf16")
    assert result["notes"]
    assert (result["outcome"]["conversion"] is not None) == (dtype == "mxfp4")
    assert_sound(out, source)


def test_prune_takes_a_plan_file_as_it_stands(tmp_path: Path, capsys: Capture) -> None:
    source = write_checkpoint(tmp_path / "in", Shape(layers=2, experts=4), shards=2)
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    done(call(capsys, "plan", "--keep", "0,1", source, "-o", plan))
    edited = json.loads(plan.read_text()) | {"layers": [[3, 0], [1, 2]], "top_k": 1, "note": "mine"}
    plan.write_text(json.dumps(edited))
    done(call(capsys, "prune", source, out, "--plan", plan))
    assert_same_tensors(load_tensors(out), kept_tensors(load_tensors(source), [[3, 0], [1, 2]]))
    assert load_config(out)["num_experts_per_tok"] == 1
    assert json.loads((out / "surgery.json").read_text())["plan"] == edited


def test_shards_that_the_index_does_not_list_are_ignored_with_a_note(tmp_path: Path, capsys: Capture) -> None:
    source = write_checkpoint(tmp_path / "in", shards=2)
    extra = write_checkpoint(tmp_path / "other") / "model.safetensors"
    extra.rename(source / "extra.safetensors")
    for arguments in (["inspect", source], ["prune", source, tmp_path / "out", "--keep", "0"]):
        ended = done(call(capsys, *arguments))
        assert "extra.safetensors (not listed in model.safetensors.index.json)" in ended.err


# --- verify, doctor


def test_verify_tells_sound_from_broken(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    done(call(capsys, "prune", TINY, out, "--keep", "0-3"))
    sound = done(call(capsys, "verify", out, "--source", TINY))
    assert sound.out.startswith(f"{out}: OK (")
    assert done(call(capsys, "verify", out, "--json")).json()["ok"] is True
    assert "structure only" in done(call(capsys, "verify", out, "--structure-only")).out

    shard = out / "model.safetensors"
    data = np.memmap(shard, np.uint8, "r+")
    data[-1] ^= 1
    data.flush()
    broken = call(capsys, "verify", out)
    assert (broken.code, broken.out) == (8, "")
    assert all(line.startswith("moe-surgery: ") for line in broken.err.splitlines())
    assert "model.safetensors" in broken.err
    result = call(capsys, "verify", out, "--json")
    assert result.code == 8
    assert result.json()["ok"] is False
    assert result.json()["problems"]


def test_doctor_tells_versions_instruction_sets_and_devices(capsys: Capture) -> None:
    result = done(call(capsys, "doctor", "--json")).json()
    assert set(result) == {"versions", "machine", "MXFP4 conversion", "devices", "backends"}
    shown = done(call(capsys, "doctor")).out
    for section, entries in result.items():
        assert section in shown
        assert all(name in shown for name in entries)
