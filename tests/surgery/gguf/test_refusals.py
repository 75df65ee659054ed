"""Plans and options that are refused before the first byte is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_surgery import Plan, make_plan, plan_keeping, prune
from moe_surgery.errors import MoeSurgeryError, OutputError, PlanMismatchError, UsageError
from tests.support.raw_gguf import TinyMoe, write_split

from .models import DEEPSEEK, HASHED, pruned, rows, write_hashed

GROVE = TinyMoe(
    "grovemoe",
    keys={"grovemoe.experts_per_group": ("u32", 2)},
    extra={"ffn_up_chexps.weight": ("Q8_0", (32, 8, 4))},
)
ONE_GROUP = TinyMoe(
    keys={"qwen3moe.expert_group_count": ("u32", 1), "qwen3moe.expert_group_used_count": ("u32", 1)}
)
FEW = TinyMoe(
    "deepseek2",
    top_k=4,
    keys={
        "deepseek2.expert_group_count": ("u32", 2),
        "deepseek2.expert_group_used_count": ("u32", 1),
    },
)


@pytest.mark.parametrize(
    ("model", "kept", "options", "words"),
    [
        (TinyMoe("llama4", experts=128, top_k=1, blocks=1), [range(64)], {}, "normalises queries and keys"),
        (GROVE, [(0, 1, 2, 3)], {}, "experts_per_group"),
        (GROVE, [(1, 0, *range(2, 8))], {}, "experts_per_group"),
        (ONE_GROUP, [(0,)], {}, "needs at least 2 experts"),
        (DEEPSEEK, [(0, 1, 2, 4)], {}, "keep 2 experts of each of the 2 groups"),
        (DEEPSEEK, [(0, 4, 1, 5)], {}, "group after group"),
        (DEEPSEEK, [(0, 1, 4)], {}, "3 experts do not divide into the 2 groups"),
        (DEEPSEEK, [(0, 4)], {}, "a group's score needs 2"),
        (FEW, [(0, 1, 4, 5)], {}, "fewer than its top-4"),
        (HASHED, [(0, 1)], {}, "needs at least 3 experts"),
        (HASHED, [(0, 1, 2, 3)], {"top_k": 2}, "tables of 3 experts for each token"),
        (TinyMoe(), [(0, 1), (0, 1), (0, 1, 2)], {}, "a GGUF file has one number for all layers"),
        (TinyMoe(), [(0, 1)], {"mtp": "drop"}, "has no layers for multi-token prediction"),
        (TinyMoe(), [(0, 1)], {"max_shard_size": 0}, "`max_shard_size` 0"),
        (TinyMoe(), [(0, 1)], {"store": "bf16"}, "`store` bf16: weights of a GGUF file are copied"),
        (TinyMoe(), [(0, 1)], {"base_model": "a/b"}, "`base_model`"),
        (TinyMoe(), [(0, 1)], {"top_k": 3}, "`top_k` 3: the plan keeps 2 experts"),
        (TinyMoe(experts=1030, blocks=1), [range(1029)], {}, "llama.cpp allows 1024"),
    ],
)
def test_plans_and_options(
    tmp_path: Path, model: TinyMoe, kept: list[Any], options: dict[str, Any], words: str
) -> None:
    source = write_hashed(tmp_path / "m.gguf") if model is HASHED else model.write(tmp_path / "m.gguf")
    with pytest.raises((PlanMismatchError, UsageError)) as caught:
        pruned(source, tmp_path / "out.gguf", *kept, **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(
    "plan",
    [
        Plan("gpt_oss", 8, ((0, 1),) * 3),
        Plan("qwen3_moe", 9, ((0, 1),) * 3),
        Plan("qwen3_moe", 8, ((0, 1),) * 2),
        Plan("qwen3_moe", 8, ((0, 1),) * 3, layer_numbers=(1, 2, 3)),
        Plan("qwen3_moe", 8, ((0, 1),) * 3, mtp_layers=((0, 1),)),
    ],
)
def test_plans_of_other_models(tmp_path: Path, plan: Plan) -> None:
    source = TinyMoe().write(tmp_path / "m.gguf")
    with pytest.raises(PlanMismatchError):
        prune(source, tmp_path / "out.gguf", plan)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2", "kimi_k2"])
def test_plans_of_any_model_behind_the_architecture(tmp_path: Path, name: str) -> None:
    source = TinyMoe("deepseek2").write(tmp_path / "m.gguf")
    prune(source, tmp_path / "out.gguf", Plan(name, 8, ((0, 1),) * 3))


def test_make_plan_checks_routing(tmp_path: Path) -> None:
    source = DEEPSEEK.write(tmp_path / "m.gguf")
    plan = make_plan(source, rows((0, 2, 4, 6)))
    assert plan.layer_numbers == (1, 2)
    with pytest.raises(PlanMismatchError, match="do not divide"):
        make_plan(source, rows((0, 2, 4)))


@pytest.mark.parametrize(
    ("out", "error", "words"),
    [
        ("m.gguf", UsageError, "is the source"),
        ("out", UsageError, "name the output OUT.gguf"),
        ("there.gguf", OutputError, "exists"),
        ("folder.gguf", UsageError, "is a folder"),
        ("missing/out.gguf", OutputError, "no such folder"),
    ],
)
def test_outputs(tmp_path: Path, out: str, error: type[MoeSurgeryError], words: str) -> None:
    source = TinyMoe().write(tmp_path / "m.gguf")
    (tmp_path / "there.gguf").write_bytes(b"mine")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(error, match=words):
        pruned(source, tmp_path / out, [0, 1], overwrite=out != "there.gguf")
    assert (tmp_path / "there.gguf").read_bytes() == b"mine"


def test_overwriting(tmp_path: Path) -> None:
    source = TinyMoe().write(tmp_path / "m.gguf")
    out = tmp_path / "out.gguf"
    pruned(source, out, [0, 1], manifest=True)
    assert (tmp_path / "out.gguf.surgery.json").exists()
    pruned(source, out, [0, 1, 2], overwrite=True)
    assert not (tmp_path / "out.gguf.surgery.json").exists()  # it described the old file
    pruned(source, out, [0, 1], max_shard_size=20_000)
    first = next(tmp_path.glob("out-00001-*"))
    before = sorted(p.name for p in tmp_path.glob("out-*"))
    with pytest.raises(OutputError, match="exists"):
        pruned(source, out, [2, 3], max_shard_size=20_000, overwrite=False)
    content = first.read_bytes()
    pruned(source, out, [2, 3], max_shard_size=20_000, overwrite=True)
    assert first.read_bytes() != content
    assert sorted(p.name for p in tmp_path.glob("out-*")) == before


def test_a_set_never_replaces_its_source(tmp_path: Path) -> None:
    model = TinyMoe()
    source = write_split(tmp_path, "m", model.entries(), model.tensors(), 3)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(UsageError, match="is the source"):
        pruned(source, tmp_path / "m.gguf", range(8), max_shard_size=64_000, overwrite=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    source = TinyMoe().write(tmp_path / "m.gguf")
    result = pruned(source, tmp_path / "out.gguf", [0, 1], dry_run=True)
    assert result.outcome is None
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    pruned(source, tmp_path / "out.gguf", [0, 1])
    assert (tmp_path / "out.gguf").stat().st_size == result.program.nbytes


def test_plans_of_the_safetensors_model_fit(tmp_path: Path) -> None:
    source = TinyMoe("gpt-oss").write(tmp_path / "m.gguf")

    class Described:
        model_type, experts, layers = "gpt_oss", 8, 3

    prune(source, tmp_path / "out.gguf", plan_keeping([0, 1, 2], Described()))
