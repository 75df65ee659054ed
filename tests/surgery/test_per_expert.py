"""Checkpoints that store each expert separately: which bytes stay, under which names, and what settings say."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from moe_surgery import Plan, inspect, load_plan, prune, verify
from moe_surgery.errors import PlanMismatchError, UsageError
from moe_surgery.pipeline.planning import make_plan
from moe_surgery.selection.plan import plan_keeping
from tests.support.per_expert import (
    DENSE,
    EXPERTS,
    FORMATS,
    HIDDEN,
    LAYERS,
    Tensors,
    config,
    deepseek,
    pruned,
    read,
    rows,
    write,
)

KEPT = {1: (4, 0, 3), 2: (5, 1, 2), 3: (0, 1, 5)}
PLAN = Plan("deepseek_v3", EXPERTS, tuple(KEPT.values()), layer_numbers=tuple(KEPT))
MTP = f"model.layers.{LAYERS}."


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def largest_rows(tensors: Tensors, count: int) -> tuple[int, ...]:
    """The experts of the MTP layer with the largest router rows, which are float32."""
    raw = tensors[MTP + "mlp.gate.weight"][2]
    values = struct.unpack(f"<{len(raw) // 4}f", raw)
    norms = [sum(x * x for x in values[e * HIDDEN : (e + 1) * HIDDEN]) for e in range(EXPERTS)]
    return tuple(sorted(sorted(range(EXPERTS), key=lambda e: -norms[e])[:count]))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shards", [1, 4])
def test_kept_experts_are_renumbered_with_all_their_tensors(fmt: str, shards: int, tmp_path: Path) -> None:
    tensors = deepseek(fmt)
    source = write(tmp_path / "in", tensors, config(), shards=shards)
    out = tmp_path / "out"
    prune(source, out, PLAN, max_shard_size=30_000)
    assert read(out) == pruned(tensors, KEPT)
    assert verify(out, source=source).problems == ()
    assert settings(out) == config(n_routed_experts=3)
    names = sorted(f.name for f in out.glob("*.safetensors"))
    assert len(names) > 2
    assert all(name.startswith("model-") for name in names)
    mapping = json.loads((out / "expert_mapping.json").read_text())
    assert mapping == {str(n): {str(old): new for new, old in enumerate(row)} for n, row in KEPT.items()}


@pytest.mark.parametrize("fmt", FORMATS)
def test_an_experts_tensors_are_adjacent_and_aligned(fmt: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in", deepseek(fmt), config(), shards=3)
    prune(source, tmp_path / "out", PLAN, max_shard_size=40_000)
    seen = set()
    for file in (tmp_path / "out").glob("*.safetensors"):
        raw = file.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        header.pop("__metadata__")
        last = ""
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            width = {"F32": 4, "I32": 4, "I64": 8, "BF16": 2, "F16": 2, "I16": 2}.get(entry["dtype"], 1)
            assert entry["data_offsets"][0] % width == 0
            expert = ".".join(name.split(".")[:6]) if ".experts." in name else ""
            if expert != last:
                assert expert not in seen, "in two places"
                seen.add(expert or last)
            last = expert
    assert len(seen - {""}) >= 9


def test_mtp_layers_keep_as_many_experts_with_the_largest_router_rows(tmp_path: Path) -> None:
    tensors = deepseek("fp8 block", mtp=True)
    source = write(tmp_path / "in", tensors, config(mtp=True), shards=2)
    assert inspect(source).mtp_layers == (f"model.layers.{LAYERS}",)
    result = prune(source, tmp_path / "out", PLAN)
    rows = largest_rows(tensors, 3)
    assert read(tmp_path / "out") == pruned(tensors, {**KEPT, LAYERS: rows})
    assert settings(tmp_path / "out") == config(mtp=True, n_routed_experts=3)
    assert result.program.plan.mtp_layers == (rows,)
    assert verify(tmp_path / "out", source=source).problems == ()
    assert any("largest router rows" in note for note in result.notes)
    mapping = json.loads((tmp_path / "out" / "expert_mapping.json").read_text())
    assert mapping[f"model.layers.{LAYERS}"] == {str(e): i for i, e in enumerate(rows)}


def test_mtp_layers_can_be_listed_in_the_plan_or_dropped(tmp_path: Path) -> None:
    tensors = deepseek(mtp=True)
    source = write(tmp_path / "in", tensors, config(mtp=True))
    listed = Plan(
        "deepseek_v3", EXPERTS, PLAN.layers, layer_numbers=PLAN.layer_numbers, mtp_layers=((5, 0, 2),)
    )
    (tmp_path / "plan.json").write_text(listed.to_json())
    assert load_plan(tmp_path / "plan.json") == listed
    prune(source, tmp_path / "listed", tmp_path / "plan.json")
    assert read(tmp_path / "listed") == pruned(tensors, {**KEPT, LAYERS: (5, 0, 2)})
    prune(source, tmp_path / "dropped", PLAN, mtp="drop")
    without = {n: v for n, v in tensors.items() if not n.startswith(MTP)}
    assert read(tmp_path / "dropped") == pruned(without, KEPT)
    assert settings(tmp_path / "dropped")["num_nextn_predict_layers"] == 0
    for out in ("listed", "dropped"):
        assert verify(tmp_path / out, source=source).problems == ()


def test_dropping_mtp_layers_needs_some(tmp_path: Path) -> None:
    source = write(tmp_path / "in", deepseek(), config())
    with pytest.raises(UsageError, match="has no layers for multi-token prediction"):
        prune(source, tmp_path / "out", PLAN, mtp="drop")


def test_conversion_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "in", deepseek(), config())
    with pytest.raises(UsageError, match="conversions support gpt-oss only"):
        prune(source, tmp_path / "out", PLAN, store="mxfp4")


def test_counts_change_in_every_place_and_form(tmp_path: Path) -> None:
    nested = {"num_experts": EXPERTS, "num_experts_per_tok": [2, 2], "hidden_size": HIDDEN}
    source = write(tmp_path / "in", deepseek(), config(num_local_experts=EXPERTS, text_config=nested))
    prune(source, tmp_path / "out", PLAN, top_k=3)
    assert settings(tmp_path / "out") == config(
        n_routed_experts=3,
        num_local_experts=3,
        num_experts_per_tok=3,
        text_config={"num_experts": 3, "num_experts_per_tok": [3, 3], "hidden_size": HIDDEN},
    )


def test_expert_numbers_in_quantisation_settings_follow(tmp_path: Path) -> None:
    def quantization(name: str) -> dict[str, object]:
        return {
            "quant_method": "some",
            "ignore": [
                "lm_head",
                "re:.*mlp\\.(gate|up)_proj.*",
                f"{name.format(0)}.up_proj",
                f"{name.format(1)}.up_proj",
            ],
            "dynamic": {
                f"-:{name.format(4)}\\.down_proj".replace(".", "\\.").replace("\\\\.", "\\."): {},
                "+:.*": {"bits": 8},
            },
            "tensor_storage": {f"{name.format(2)}.up_proj": {"key": f"{name.format(3)}.up_proj"}},
        }

    expert = "model.layers.1.mlp.experts.{}"
    source = write(tmp_path / "in", deepseek(), config(quantization_config=quantization(expert)))
    (source / "hf_quant_config.json").write_text(
        json.dumps({"quantized_layers": {f"{expert.format(4)}.up_proj": 1, "a": 2}})
    )
    (source / "quantize_config.json").write_text(json.dumps({"bits": 4}))
    prune(source, tmp_path / "out", PLAN)
    assert settings(tmp_path / "out")["quantization_config"] == {
        "quant_method": "some",
        "ignore": ["lm_head", "re:.*mlp\\.(gate|up)_proj.*", "model.layers.1.mlp.experts.1.up_proj"],
        "dynamic": {"-:model\\.layers\\.1\\.mlp\\.experts\\.0\\.down_proj": {}, "+:.*": {"bits": 8}},
        "tensor_storage": {},
    }
    side = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    assert side == {"quantized_layers": {"model.layers.1.mlp.experts.0.up_proj": 1, "a": 2}}
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == {"bits": 4}
    assert verify(tmp_path / "out", source=source).problems == ()


# --- groups


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ((0, 1, 2, 3), "4 experts do not divide into the 3 groups"),
        ((0, 2, 4), "3 experts leave 1 in each of 3 groups, and a group's score needs 2; keep 6 experts"),
    ],
)
def test_groups_need_the_same_number_of_experts(rows: Sequence[int], expected: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in", deepseek(), config(n_group=3, topk_group=2))
    with pytest.raises(PlanMismatchError, match=expected):
        prune(source, tmp_path / "out", lambda m: plan_keeping(rows, m))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ((0, 1, 2, 3, 6, 7), "layer 1: expert 2 of group 0 is in the place of one of group 1"),
        ((4, 5, 0, 1, 8, 9), "layer 1: expert 4 of group 1 is in the place of one of group 0"),
    ],
)
def test_groups_keep_their_order(rows: Sequence[int], expected: str, tmp_path: Path) -> None:
    settings = config(experts=12, n_group=3, topk_group=2)
    source = write(tmp_path / "in", deepseek(experts=12), settings)
    with pytest.raises(PlanMismatchError, match=expected):
        make_plan(source, lambda m: plan_keeping(rows, m))


def test_a_plan_for_other_layer_numbers_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "in", deepseek(), config())
    plan = Plan("deepseek_v3", EXPERTS, PLAN.layers)
    with pytest.raises(
        PlanMismatchError, match=r"the plan is for layers 0 to 2, but the MoE layers of .* are 1 to 3"
    ):
        prune(source, tmp_path / "out", plan)


def test_inspect_names_layers_and_formats(tmp_path: Path) -> None:
    source = write(
        tmp_path / "in",
        deepseek("fp8 block", mtp=True),
        config(mtp=True, quantization_config={"quant_method": "fp8"}),
    )
    found = inspect(source)
    assert (found.layers, found.layer_numbers, found.dense_layers) == (LAYERS - DENSE, (1, 2, 3), DENSE)
    assert found.expert_format.label == "F8_E4M3 (fp8)"
    assert found.layout == "per expert"
    # Each expert: three matrices of HIDDEN x 32 weights, in three layers and one for multi-token prediction.
    assert found.parameters_per_expert == 4 * 3 * HIDDEN * 32
    assert [s.nbytes(found.expert_format) for s in found.sizes][-1] == found.nbytes
    out = tmp_path / "out"
    prune(source, out, lambda m: plan_keeping([0, 2], m))
    assert inspect(out).nbytes == found.sizes[1].nbytes(found.expert_format)


def test_layouts_and_prefixes_may_be_mixed(tmp_path: Path) -> None:
    """As Qwen3.5 has it: main layers stacked, those for multi-token prediction apart and with another prefix."""
    separate = {n: v for n, v in deepseek(mtp=True).items() if "e_score" not in n and "shared" not in n}
    tensors = {n.replace(MTP, "mtp.layers.0."): v for n, v in separate.items() if n.startswith(MTP)}
    tensors |= {"mtp.fc.weight": separate["model.norm.weight"]}
    tensors |= {n: v for n, v in separate.items() if ".experts." not in n and not n.startswith(MTP)}
    expected = dict(tensors)
    for layer, kept in KEPT.items():
        for part in ("gate_proj", "up_proj", "down_proj"):
            stem = f"model.layers.{layer}.mlp.experts."
            experts = [separate[f"{stem}{e}.{part}.weight"] for e in range(EXPERTS)]
            dtype, shape, _ = experts[0]
            tensors[stem + part] = (dtype, (EXPERTS, *shape), b"".join(e[2] for e in experts))
            expected[stem + part] = (dtype, (3, *shape), b"".join(experts[e][2] for e in kept))
        name = f"model.layers.{layer}.mlp.gate.weight"
        expected[name] = rows(tensors[name], kept)
    text = {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "num_hidden_layers": LAYERS,
        "mtp_num_hidden_layers": 1,
    }
    source = write(tmp_path / "in", tensors, {"model_type": "qwen3_5_moe", "text_config": text}, shards=3)
    assert inspect(source).layout == "mixed"
    plan = Plan(
        "qwen3_5_moe", EXPERTS, PLAN.layers, layer_numbers=PLAN.layer_numbers, mtp_layers=((5, 0, 2),)
    )
    prune(source, tmp_path / "kept", plan)
    for name in [n for n in expected if n.startswith("mtp.layers.0.mlp.")]:
        value = expected.pop(name)
        if ".gate." in name:
            expected[name] = rows(value, (5, 0, 2))
            continue
        parts = name.split(".")
        if int(parts[5]) in (5, 0, 2):
            expected[".".join([*parts[:5], "#" + str((5, 0, 2).index(int(parts[5]))), *parts[6:]])] = value
    assert read(tmp_path / "kept") == {n.replace("#", ""): v for n, v in expected.items()}
    prune(source, tmp_path / "dropped", plan, mtp="drop")
    assert read(tmp_path / "dropped") == {n: v for n, v in expected.items() if not n.startswith("mtp.")}
    changed = {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "num_hidden_layers": LAYERS,
        "mtp_num_hidden_layers": 0,
    }
    assert settings(tmp_path / "dropped")["text_config"] == changed
    for out in ("kept", "dropped"):
        assert verify(tmp_path / out, source=source).problems == ()
