"""What of an adapter cannot be merged is named, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moe_surgery import inspect, make_card, merge_adapter, verify
from moe_surgery.errors import MoeSurgeryError
from tests.support.adapters import EXPERTS, factors, write_adapter
from tests.support.checkpoints import Shape, Tensors, write_checkpoint

SHAPE = Shape()
Q = "model.layers.0.self_attn.q_proj"
HEADS = SHAPE.heads * SHAPE.head_dim
GOOD = factors(Q, 4, SHAPE.hidden, HEADS)


def without(name: str) -> Tensors:
    return {key: value for key, value in GOOD.items() if name not in key}


CASES: dict[str, tuple[Tensors, dict[str, object], str]] = {
    "not LoRA": (GOOD, {"peft_type": "IA3"}, "peft_type is the string 'IA3'; only LORA"),
    "DoRA": (GOOD, {"use_dora": True}, "use_dora is true: DoRA rescales"),
    "an unknown key": (GOOD, {"use_quantum": True}, "use_quantum is true: this key is not known here"),
    "PiSSA": (GOOD, {"init_lora_weights": "pissa"}, "init_lora_weights is .* also changes the base weights"),
    "rank 0": (GOOD, {"r": 0}, "r is 0, not a rank"),
    "a bad pattern": (GOOD, {"rank_pattern": {"(": 4}}, "rank_pattern: \\( is not a regular expression"),
    "another rank": (GOOD, {"r": 8}, "do not fit .*q_proj .* of rank 8"),
    "a DoRA tensor": (
        {**GOOD, f"{Q}.lora_magnitude_vector": np.ones(HEADS, np.float32)},
        {},
        "lora_magnitude_vector' is part of a DoRA adapter",
    ),
    "half a pair": (without("lora_A"), {}, "lora_B.weight' has no counterpart"),
    "no such module": (factors("model.layers.7.self_attn.q_proj", 4, 64, HEADS), {}, "has no place"),
    "a norm": (factors("model.norm", 4, 64, 64), {}, "which is no matrix"),
    "another width": (factors(Q, 4, 96, HEADS), {}, "do not fit .*made for another model"),
    "another model's experts": (
        factors(EXPERTS.format(0), 4 * 6, SHAPE.intermediate, SHAPE.hidden),
        {"target_parameters": ["experts.down_proj"]},
        "was made for 6 experts, the checkpoint has 4",
    ),
    "a resized vocabulary": (
        {**GOOD, "lm_head.weight": np.zeros((30, SHAPE.hidden), np.float32)},
        {},
        r"lm_head.weight' \[30, 64\] cannot replace lm_head.weight \[24, 64\]",
    ),
    "numbers of another kind": (
        {**GOOD, f"{Q}.lora_A.weight": np.ones((4, SHAPE.hidden), np.uint8)},
        {},
        "is stored as U8; BF16, F16 or F32",
    ),
    "infinite": (
        {**GOOD, f"{Q}.lora_B.weight": np.full((HEADS, 4), np.inf, np.float32)},
        {},
        "the adapter's update holds NaN or infinity",
    ),
    "a layer and a part of it": (
        {
            **factors(f"{EXPERTS.format(0)}.1.gate_proj", 4, 64, SHAPE.intermediate),
            **factors(f"{EXPERTS.format(0)}.1.gate_up_proj", 4, 64, 2 * SHAPE.intermediate),
        },
        {},
        "has several updates of",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_merged_is_named(case: str, tmp_path: Path) -> None:
    tensors, config, message = CASES[case]
    source = write_checkpoint(tmp_path / "in", SHAPE)
    lora = write_adapter(tmp_path / "lora", tensors, 4, **config)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(MoeSurgeryError, match=message) as raised:
        merge_adapter(lora, source, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json: not found"),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "adapter_model.safetensors: not found",
    ),
    "a pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "adapter_model.bin is a PyTorch file",
    ),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("r = 4"), "adapter_config.json"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_what_is_no_adapter_is_said(case: str, tmp_path: Path) -> None:
    lora = write_adapter(tmp_path / "lora", GOOD)
    edit, message = FOLDERS[case]
    edit(lora)
    with pytest.raises(MoeSurgeryError, match=message):
        merge_adapter(lora, "example:tiny", tmp_path / "out")


def test_an_adapter_passed_as_a_checkpoint_is_recognised(tmp_path: Path) -> None:
    lora = write_adapter(tmp_path / "lora", GOOD)
    with pytest.raises(MoeSurgeryError, match="moe-surgery merge ADAPTER CKPT OUT"):
        inspect(lora)
    with pytest.raises(MoeSurgeryError, match="moe-surgery merge ADAPTER CKPT OUT"):
        inspect(lora / "adapter_config.json")


def test_another_adapter_does_not_verify(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", SHAPE)
    lora = write_adapter(tmp_path / "lora", GOOD)
    merge_adapter(lora, source, tmp_path / "out")
    other = write_adapter(tmp_path / "other", factors(Q, 4, SHAPE.hidden, HEADS, seed=1))
    with pytest.raises(MoeSurgeryError, match="is not the adapter that was merged"):
        verify(tmp_path / "out", source=source, adapter=other)
    with pytest.raises(MoeSurgeryError, match="`adapter` needs `source`"):
        verify(tmp_path / "out", adapter=lora)


def test_the_manifest_and_the_card_name_the_adapter(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", SHAPE)
    lora = write_adapter(tmp_path / "my-lora", GOOD, 4, base_model_name_or_path="openai/gpt-oss-20b")
    result = merge_adapter(lora, source, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "surgery.json").read_text())
    entry = manifest["source"]["adapter"]
    assert entry == result.adapter
    assert (entry["name"], entry["ranks"], entry["base_model"]) == ("my-lora", [4], "openai/gpt-oss-20b")
    assert entry["tensors"] == [f"{Q}.weight"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the LoRA adapter `my-lora` of rank 4, trained on `openai/gpt-oss-20b`, merged" in " ".join(
        card.split()
    )
    assert "moe-surgery merge ADAPTER" in card
    assert "othing was trained" not in card
    assert make_card(tmp_path / "out") == card
