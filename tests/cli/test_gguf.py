"""GGUF files at the command line: what is printed, and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.command import call, refused
from tests.support.gguf_slices import assert_pruned
from tests.support.raw_gguf import TinyMoe, write_split

Capture = pytest.CaptureFixture[str]

MODEL = TinyMoe(
    "deepseek2",
    blocks=4,
    dense=1,
    mtp=1,
    keys={
        "deepseek2.expert_group_count": ("u32", 2),
        "deepseek2.expert_group_used_count": ("u32", 1),
        "deepseek2.expert_gating_func": ("u32", 2),
    },
)
RANKING = {f"layer_{n}": [7, 6, 3, 2, 5, 4, 1, 0] for n in (1, 2)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return MODEL.write(tmp_path / "m.gguf")


def test_inspect(source: Path, capsys: Capture) -> None:
    shown = call(capsys, "inspect", source)
    assert shown.code == 0, shown.err
    lines = shown.out.splitlines()
    assert "family      DeepSeek-V2/V3 (deepseek_v3, GGUF layout)" in lines
    assert (
        "experts     8 in each of 2 layers, top-2, from 1 of 2 groups, stored as Q8_0; 1 layer is dense; blk.3 for "
        "multi-token prediction besides" in lines
    )
    assert "llama.cpp   architecture deepseek2, routing: sigmoid" in lines
    assert "imatrix     file im.gguf" in lines
    assert any(line.split()[:1] == ["5"] and line.endswith("not possible ") for line in lines)
    assert "not possible" not in next(line for line in lines if line.split()[:1] == ["4"])


def test_inspect_as_json(source: Path, capsys: Capture) -> None:
    document = call(capsys, "inspect", source, "--json").json()
    assert document["architecture"] == "deepseek2"
    assert document["possible_counts"] == [4, 6, 8]
    assert document["fast_counts"] == []
    assert document["types"]["router"] == {"F32": 2 * 8 * 32 * 4}
    assert document["imatrix"] == {"file": "im.gguf"}
    assert document["refusal"] is None
    assert len(document["sizes"]) == 8
    assert document["bytes_per_expert"] == 3 * 3 * 32 * 64 // 32 * 34


def test_fast_counts_and_refusals_are_shown(tmp_path: Path, capsys: Capture) -> None:
    shown = call(capsys, "inspect", TinyMoe(experts=16).write(tmp_path / "a.gguf"))
    fast = [line.split()[0] for line in shown.out.splitlines() if line.rstrip().endswith("fast")]
    assert fast == ["2", "4", "8", "16"]
    maverick = TinyMoe("llama4", experts=128, top_k=1, blocks=1).write(tmp_path / "b.gguf")
    shown = call(capsys, "inspect", maverick)
    assert "normalises queries and keys" in shown.err
    assert "not possible" in shown.out


def test_ranked_pruned_and_verified(source: Path, tmp_path: Path, capsys: Capture) -> None:
    ranking, out = tmp_path / "ranking.json", tmp_path / "out.gguf"
    ranking.write_text(json.dumps(RANKING))
    shown = call(
        capsys, "prune", source, out, "--ranking", ranking, "--experts", "5", "--mtp", "drop", "--manifest"
    )
    assert shown.code == 0, shown.err
    assert shown.out.startswith(f"{out}: 4 of 8 experts, top-2, ")
    assert "in 1 shard (Q8_0 experts)" in shown.out
    assert "keeping 4 experts instead of 5" in shown.err
    kept = (2, 3, 6, 7)
    assert_pruned(source, out, {1: kept, 2: kept}, 8, dropped=[3])
    checked = call(capsys, "verify", out, "--source", source)
    assert checked.out.startswith(f"{out}: OK (1 files, ") or checked.out.startswith(f"{out}: OK (1 file")
    assert checked.err == ""


def test_plans_are_those_of_the_safetensors_model(source: Path, tmp_path: Path, capsys: Capture) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out.gguf"
    planned = call(capsys, "plan", source, "--keep", "0,1,4,5", "-o", plan)
    assert planned.code == 0, planned.err
    document = json.loads(plan.read_text())
    assert (document["model_type"], document["layer_numbers"]) == ("deepseek_v3", [1, 2])
    plan.write_text(plan.read_text().replace("deepseek_v3", "kimi_k2"))
    shown = call(capsys, "prune", source, out, "--plan", plan, "--json")
    assert shown.json()["shards"][0]["name"] == "out.gguf"
    assert shown.json()["experts"] == 4


def test_target_size(source: Path, tmp_path: Path, capsys: Capture) -> None:
    ranking = tmp_path / "ranking.json"
    ranking.write_text(json.dumps(RANKING))
    planned = call(capsys, "plan", ranking, source, "--target-size", "160kB")
    assert planned.code == 0, planned.err
    kept = len(json.loads(planned.out)["layers"][0])
    sizes = {
        s["experts"]: s["stored_bytes"] for s in call(capsys, "inspect", source, "--json").json()["sizes"]
    }
    assert sizes[kept] <= 160_000


def test_a_dry_run_shows_the_files(source: Path, tmp_path: Path, capsys: Capture) -> None:
    shown = call(
        capsys,
        "prune",
        source,
        tmp_path / "out.gguf",
        "--keep",
        "0,1,4,5",
        "--max-shard-size",
        "60kB",
        "--dry-run",
    )
    assert "out-00001-of-0000" in shown.out
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_a_flipped_byte_needs_the_manifest_or_the_source(
    source: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out.gguf"
    call(capsys, "prune", source, out, "--keep", "0,1,4,5")
    raw = bytearray(out.read_bytes())
    raw[len(raw) // 2] ^= 4
    out.write_bytes(raw)
    structure = call(capsys, "verify", out)
    assert structure.code == 0
    assert "its weights were not: there is no out.gguf.surgery.json" in structure.err
    assert "--source" in structure.err
    assert "differs from the kept experts of" in refused(call(capsys, "verify", out, "--source", source), 8)


def test_the_second_file_of_a_set_is_refused(tmp_path: Path, capsys: Capture) -> None:
    write_split(tmp_path, "m", MODEL.entries(), MODEL.tensors(), 2)
    message = refused(call(capsys, "inspect", tmp_path / "m-00002-of-00002.gguf"), 3)
    assert "pass m-00001-of-00002.gguf" in message or "00001-of-00002" in message


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--keep", "0-3", "--store", "bf16"], 2, "--store bf16: weights of a GGUF file are copied"),
        (["--keep", "0-2"], 4, "3 experts do not divide into the 2 groups"),
        (["--keep", "all", "--base-model", "a/b"], 2, "--base-model"),
    ],
)
def test_options_that_do_not_fit(
    source: Path, tmp_path: Path, capsys: Capture, options: list[str], code: int, words: str
) -> None:
    assert words in refused(call(capsys, "prune", source, tmp_path / "out.gguf", *options), code)


def test_other_commands_say_who_takes_it(source: Path, capsys: Capture) -> None:
    message = refused(call(capsys, "export", source, "x.gguf"), 2)
    assert "is a GGUF file, not a checkpoint; inspect, plan, prune and verify take it" in message


def test_a_missing_file(tmp_path: Path, capsys: Capture) -> None:
    assert "no such file" in refused(call(capsys, "inspect", tmp_path / "none.gguf"), 5)
