"""Which tensors of a GGUF file count experts, and which files are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from moe_surgery.checkpoint.gguf.model_file import GgufModel
from moe_surgery.checkpoint.local_file import LocalFolder
from moe_surgery.errors import InvalidInputError
from moe_surgery.families import ModelSpec, Role
from moe_surgery.families.gguf import identify_gguf
from tests.support.raw_gguf import Tensor, TinyMoe, write

GPT_OSS = TinyMoe("gpt-oss", biases=True, extra={"ffn_gate_inp.bias": ("F32", (8,))})
DEEPSEEK = TinyMoe(
    "deepseek2",
    blocks=4,
    dense=1,
    mtp=1,
    selection_bias="exp_probs_b.bias",
    keys={
        "deepseek2.expert_group_count": ("u32", 4),
        "deepseek2.expert_group_used_count": ("u32", 2),
        "deepseek2.expert_gating_func": ("u32", 2),
    },
    extra={"ffn_up_shexp.weight": ("F16", (32, 8))},
)
TABLE = {"ffn_gate_tid2eid.weight": ("I32", (3, 10))}


def identify(path: Path) -> ModelSpec:
    with GgufModel.open(LocalFolder(path.parent), path.name) as model:
        return identify_gguf(model)


def cut(spec: ModelSpec) -> set[str]:
    return {t.name.partition(".")[2].partition(".")[2] for t in spec.tensors if t.layer is not None}


def test_an_ordinary_model(tmp_path: Path) -> None:
    spec = identify(TinyMoe().write(tmp_path / "m.gguf"))
    assert (spec.model_type, spec.experts, spec.top_k, spec.layers) == ("qwen3_moe", 8, 2, 3)
    assert spec.layer_numbers == (0, 1, 2)
    assert spec.mtp_layers == ()
    assert spec.grouping is None
    assert spec.refusal is None
    assert spec.expert_format.label == "Q8_0"
    names = {"ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}
    assert cut(spec) == {f"{name}.weight" for name in names}
    assert len(spec.tensors) == 3 + 3 * 8


def test_biases_of_experts_and_router(tmp_path: Path) -> None:
    spec = identify(GPT_OSS.write(tmp_path / "m.gguf"))
    assert spec.model_type == "gpt_oss"
    assert {f"ffn_{p}_exps.bias" for p in ("gate", "up", "down")} | {"ffn_gate_inp.bias"} < cut(spec)


def test_dense_blocks_mtp_blocks_and_groups(tmp_path: Path) -> None:
    spec = identify(DEEPSEEK.write(tmp_path / "m.gguf"))
    assert spec.model_types[0] == "deepseek_v3"
    assert "kimi_k2" in spec.model_types
    assert (spec.layers, spec.layer_numbers, spec.mtp_layers) == (2, (1, 2), ("blk.3",))
    assert spec.grouping is not None
    assert (spec.grouping.groups, spec.grouping.used, spec.grouping.minimum) == (4, 2, 2)
    assert "exp_probs_b.bias" in cut(spec)
    assert "ffn_up_shexp.weight" not in cut(spec)
    assert all(t.mtp == t.name.startswith("blk.3.") for t in spec.tensors)
    assert {t.layer for t in spec.tensors if t.mtp} == {None, 0}


@pytest.mark.parametrize(
    ("name", "kind", "ne"),
    [
        ("exp_probs_b", "F32", (8,)),
        ("exp_probs_b_vl.bias", "F32", (8,)),
        ("ffn_down_exps.scale", "F32", (8,)),
        ("ffn_gate_up_exps.input_scale", "F32", (8,)),
        ("ffn_gate_up_exps.bias", "F32", (64, 8)),
        ("ffn_up_chexps.weight", "Q8_0", (32, 8, 8)),
    ],
)
def test_rarer_tensors_that_count_experts(tmp_path: Path, name: str, kind: str, ne: tuple[int, ...]) -> None:
    assert name in cut(identify(TinyMoe(extra={name: (kind, ne)}).write(tmp_path / "m.gguf")))


@pytest.mark.parametrize(
    "name",
    [
        "ffn_gate_inp.scale",
        "ffn_gate_inp_shexp.weight",
        "ffn_gate_up_shexp.weight",
        "ffn_norm_exps.weight",
        "ffn_routed_down.weight",
        "ssm_expand.weight",
    ],
)
def test_tensors_that_are_never_cut_even_with_as_many_entries(tmp_path: Path, name: str) -> None:
    spec = identify(TinyMoe(extra={name: ("F32", (8,))}).write(tmp_path / "m.gguf"))
    assert name not in cut(spec)
    assert sum(t.name.endswith(name) for t in spec.tensors) == 3


def test_a_table_of_experts_sets_the_fewest(tmp_path: Path) -> None:
    spec = identify(TinyMoe("deepseek4", extra=TABLE, top_k=3).write(tmp_path / "m.gguf"))
    tables = [t for t in spec.tensors if t.role is Role.ROUTING_TABLE]
    assert len(tables) == 3
    assert spec.minimum == 3
    assert spec.dimensions["table_top_k"] == 3


def test_experts_a_block_of_an_array(tmp_path: Path) -> None:
    keys = {"nemotron_h_moe.expert_used_count": ("[u32]", [0, 2, 3])}
    spec = identify(TinyMoe("nemotron_h_moe", dense=1, keys=keys).write(tmp_path / "m.gguf"))
    assert spec.top_k == 3


def test_an_unknown_architecture_is_cut_by_the_same_names_and_noted(tmp_path: Path) -> None:
    spec = identify(TinyMoe("future-moe").write(tmp_path / "m.gguf"))
    assert spec.model_type == "future_moe"
    assert "future-moe is not known" in spec.notes[0]


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (TinyMoe("llama4", experts=128, top_k=1, blocks=1), "normalises queries and keys"),
        (
            TinyMoe(
                "grovemoe",
                keys={"grovemoe.experts_per_group": ("u32", 2)},
                extra={"ffn_up_chexps.weight": ("Q8_0", (32, 8, 4))},
            ),
            "experts_per_group",
        ),
    ],
)
def test_models_whose_experts_cannot_be_cut_are_identified(tmp_path: Path, model: TinyMoe, why: str) -> None:
    assert why in str(identify(model.write(tmp_path / "m.gguf")).refusal)


def test_scout_and_ungrouped_grovemoe_can_be_cut(tmp_path: Path) -> None:
    assert identify(TinyMoe("llama4", experts=16, top_k=1).write(tmp_path / "m.gguf")).refusal is None
    assert identify(TinyMoe("grovemoe").write(tmp_path / "m.gguf")).refusal is None


ONE_GROUP = {"qwen3moe.expert_group_count": ("u32", 1), "qwen3moe.expert_group_used_count": ("u32", 1)}


def test_one_group_needs_two_experts(tmp_path: Path) -> None:
    spec = identify(TinyMoe(keys=ONE_GROUP).write(tmp_path / "m.gguf"))
    assert (spec.grouping, spec.minimum) == (None, 2)


def keyed(**keys: tuple[str, object] | None) -> TinyMoe:
    return TinyMoe(keys={f"qwen3moe.{key}": value for key, value in keys.items()})


REFUSED: Mapping[str, tuple[TinyMoe, str]] = {
    "imatrix": (TinyMoe(keys={"general.type": ("str", "imatrix")}), "is an importance matrix"),
    "projector": (TinyMoe(keys={"general.type": ("str", "mmproj")}), "a part of a model"),
    "no architecture": (TinyMoe(keys={"general.architecture": None}), "no general.architecture"),
    "dense": (keyed(expert_count=None), "a dense model, nothing to prune"),
    "zero experts": (keyed(expert_count=("u32", 0)), "a dense model, nothing to prune"),
    "u64 count": (keyed(expert_count=("u64", 8)), "'qwen3moe.expert_count' is not a u32"),
    "i32 top-k": (keyed(expert_used_count=("i32", 2)), "'qwen3moe.expert_used_count' is not a u32"),
    "no top-k": (keyed(expert_used_count=None), "'qwen3moe.expert_used_count' is missing"),
    "too large a top-k": (keyed(expert_used_count=("u32", 9)), "is 9, but there are 8 experts"),
    "short array": (keyed(expert_used_count=("[u32]", [2, 2])), "not one number for each of 3 blocks"),
    "other count": (keyed(expert_count=("u32", 7)), "has 8 entries on its outermost axis"),
    "few blocks": (keyed(block_count=("u32", 2)), "is in block 2, but qwen3moe.block_count is 2"),
    "all blocks are MTP": (keyed(nextn_predict_layers=("u32", 3)), "is 3, but there are 3 blocks"),
    "groups": (
        keyed(expert_group_count=("u32", 3), expert_group_used_count=("u32", 1)),
        "8 experts in 3 groups of which a token uses 1",
    ),
    "all groups used": (
        keyed(expert_group_count=("u32", 4), expert_group_used_count=("u32", 4)),
        "llama.cpp aborts",
    ),
    "numbered": (TinyMoe(extra={"ffn_up.3.weight": ("F16", (32, 8))}), "before April 2024"),
    "unknown experts": (TinyMoe(extra={"ffn_lora_exps.weight": ("F16", (32, 8))}), "may count experts"),
    "unknown router": (TinyMoe(extra={"ffn_gate_inp_b.weight": ("F16", (32, 8))}), "may count experts"),
    "one entry short": (TinyMoe(extra={"exp_probs_b.bias": ("F32", (7,))}), "has 7 entries"),
    "router by rows": (
        TinyMoe(types={"ffn_gate_inp": "Q4_0_R8"}),
        "rows are interleaved by 8, and each expert has 1",
    ),
    "blocks over experts": (
        TinyMoe(experts=32, extra={"exp_probs_b.bias": ("Q8_0", (32,))}),
        "blocks span several experts",
    ),
    "table of floats": (
        TinyMoe("deepseek4", extra={"ffn_gate_tid2eid.weight": ("F32", (2, 10))}),
        "expected I32",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(tmp_path: Path, case: str) -> None:
    model, words = REFUSED[case]
    path = model.write(tmp_path / "m.gguf")
    with pytest.raises(InvalidInputError) as caught:
        identify(path)
    message = str(caught.value)
    assert words in message
    assert message.startswith(str(path))
    assert "\n" not in message


@pytest.mark.parametrize(
    ("left_out", "words"),
    [
        ("ffn_down_exps.weight", "is the router of a block without blk.1.ffn_down_exps.weight"),
        ("ffn_up_exps.weight", "is the router of a block without blk.1.ffn_up_exps.weight"),
        ("ffn_gate_inp.weight", "its block has no router"),
    ],
)
def test_incomplete_blocks(tmp_path: Path, left_out: str, words: str) -> None:
    model = TinyMoe()
    tensors = [t for t in model.tensors() if t.name != f"blk.1.{left_out}"]
    with pytest.raises(InvalidInputError, match=words):
        identify(write(tmp_path / "m.gguf", model.entries(), tensors))


def test_no_router_at_all(tmp_path: Path) -> None:
    model = replace(TinyMoe(), dense=3)
    with pytest.raises(InvalidInputError, match="no block has a router"):
        identify(model.write(tmp_path / "m.gguf"))


def test_experts_outside_blocks(tmp_path: Path) -> None:
    model = TinyMoe()
    tensors = [*model.tensors(), Tensor("dec.ffn_up_exps.weight", "F32", (1,), bytes(4))]
    with pytest.raises(InvalidInputError, match="may count experts"):
        identify(write(tmp_path / "m.gguf", model.entries(), tensors))


def test_an_expert_without_gate(tmp_path: Path) -> None:
    model = TinyMoe("nomic-bert-moe")
    tensors = [t for t in model.tensors() if "ffn_gate_exps" not in t.name]
    spec = identify(write(tmp_path / "m.gguf", model.entries(), tensors))
    assert "ffn_up_exps.weight" in cut(spec)


@pytest.mark.parametrize("kind", ["Q8_0_R8", "IQ1_S_R4", "IQ2_BN", "MXFP4"])
def test_other_types_of_experts(tmp_path: Path, kind: str) -> None:
    spec = identify(TinyMoe(expert_type=kind, hidden=64, width=64).write(tmp_path / "m.gguf"))
    assert spec.expert_format.label == kind
