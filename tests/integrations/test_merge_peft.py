"""A merge gives what PEFT's own merge_and_unload gives in float32, for every kind of adapter that PEFT makes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file, save_file  # noqa: E402

from moe_surgery import merge_adapter, plan_random, prune, verify  # noqa: E402
from moe_surgery.checkpoint.resolve import resolve  # noqa: E402
from tests.support import oracle, tiny_checkpoints  # noqa: E402
from tests.support.adapters import assert_rounded  # noqa: E402
from tests.support.checkpoints import load_config, load_tensors  # noqa: E402
from tests.support.tiny_families import FAMILIES  # noqa: E402

ATTENTION = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
STACKED = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
CONFIGS: dict[str, dict[str, object]] = {
    "attention": ATTENTION,
    "rslora and patterns": {
        **ATTENTION,
        "use_rslora": True,
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 7},
        "alpha_pattern": {"v_proj": 3},
    },
    "biases": {**ATTENTION, "lora_bias": True},
    "stacked": STACKED,
    "everything": {
        "target_modules": ["q_proj", "o_proj", "lm_head", "embed_tokens"],
        "target_parameters": [
            "router.weight",
            "experts.gate_up_proj",
            "experts.gate_up_proj_bias",
            "experts.down_proj_bias",
        ],
        "rank_pattern": {r"experts\.gate_up_proj": 2},
        "bias": "all",
    },
    "saved modules": {**ATTENTION, "modules_to_save": ["lm_head", "router", "input_layernorm"]},
}


def make_adapter(model, folder: Path, **config: object):
    """An adapter on `model` with random factors, saved by PEFT; PEFT's own model."""
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **config}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if value.requires_grad:
                noise = torch.randn(value.shape) * 0.3 / math.sqrt(value.shape[-1])
                value.copy_(noise if "lora_" in name else value + 0.1 * noise)
    adapted.save_pretrained(folder)
    return adapted


def merged_by_peft(adapted) -> dict[str, np.ndarray]:
    """Tensors of the merged model, in float32."""
    return {name: value.float().numpy() for name, value in adapted.merge_and_unload().state_dict().items()}


def check(out: Path, expected: dict[str, np.ndarray]) -> None:
    """`out`, with experts in BF16, is `expected` rounded."""
    tensors = load_tensors(out)
    assert set(tensors) == set(expected)
    for name, bits in tensors.items():
        assert bits.dtype == np.uint16
        assert_rounded(bits, expected[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_result_is_pefts(name: str, tmp_path: Path) -> None:
    adapted = make_adapter(oracle.load_model(resolve("example:tiny")), tmp_path / "lora", **CONFIGS[name])
    expected = merged_by_peft(adapted)
    result = merge_adapter(tmp_path / "lora", "example:tiny", tmp_path / "out", store="bf16")
    assert result.tensors
    check(tmp_path / "out", expected)


def test_an_adapter_of_the_full_model_on_a_pruned_one(tmp_path: Path) -> None:
    prune("example:tiny", tmp_path / "pruned", lambda model: plan_random(8, 0, model))
    config = {**STACKED, "target_parameters": [*STACKED["target_parameters"], "router.weight"]}
    expected = merged_by_peft(
        make_adapter(oracle.load_model(resolve("example:tiny")), tmp_path / "lora", **config)
    )
    merge_adapter(tmp_path / "lora", tmp_path / "pruned", tmp_path / "out", store="bf16")
    mapping = json.loads((tmp_path / "pruned" / "expert_mapping.json").read_text())
    for name in [n for n in expected if ".mlp." in n]:
        order = sorted(mapping[name.split(".")[2]].items(), key=lambda entry: entry[1])
        expected[name] = expected[name][[int(old) for old, _ in order]]
    check(tmp_path / "out", expected)


def test_a_merged_checkpoint_computes_what_the_adapter_did(tmp_path: Path) -> None:
    tokens = torch.randint(0, 2048, (2, 24), generator=torch.Generator().manual_seed(0))
    model = oracle.load_model(resolve("example:tiny"))
    adapted = make_adapter(model, tmp_path / "lora", **CONFIGS["everything"])
    wanted = oracle.logits_of(adapted.eval(), tokens)
    merge_adapter(tmp_path / "lora", "example:tiny", tmp_path / "out", store="f32")
    got = oracle.logits_of(oracle.load_model(tmp_path / "out"), tokens)
    assert (got - wanted).abs().max() < 0.05 * wanted.abs().max()


# --- other families


def bf16_checkpoint(model_type: str, folder: Path) -> Path:
    family = next(f for f in FAMILIES if f.name == model_type)
    tiny_checkpoints.save(family, folder)
    file = folder / "model.safetensors"
    save_file({n: t.bfloat16() for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["stacked", "per expert"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_families_that_store_each_expert_by_itself(model_type: str, kind: str, tmp_path: Path) -> None:
    """An adapter on what transformers 5 stacks, and one of transformers 4, which PEFT converts when loading."""
    source = bf16_checkpoint(model_type, tmp_path / "in")
    if kind == "stacked":
        config = {**STACKED, "target_modules": ["q_proj", "o_proj"]}
        adapted = make_adapter(oracle.load_model(source), tmp_path / "lora", **config)
    else:
        leaves = {"qwen3_moe": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}
        write_v4_adapter(source, tmp_path / "lora", leaves[model_type])
        adapted = peft.PeftModel.from_pretrained(oracle.load_model(source), tmp_path / "lora")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "expected")
    result = merge_adapter(tmp_path / "lora", source, tmp_path / "out")
    assert result.notes == ()
    expected, got = (load_tensors(tmp_path / name) for name in ("expected", "out"))
    assert set(expected) == set(got)
    for name, bits in got.items():
        assert_rounded(bits, expected[name])
    changed = [n for n, t in load_tensors(source).items() if t.tobytes() != got[n].tobytes()]
    assert sum(".experts." in n for n in changed) == 3 * 8 * 3
    assert verify(tmp_path / "out", source=source, adapter=tmp_path / "lora").ok


def write_v4_adapter(source: Path, folder: Path, leaves: tuple[str, ...]) -> None:
    """Factors for every expert's linear layers, as PEFT saved them where those were modules."""
    random = torch.Generator().manual_seed(2)
    tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if ".experts." in name or name.endswith("q_proj.weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            rows, columns = weight.shape
            tensors[f"{module}.lora_A.weight"] = torch.randn(3, columns, generator=random) * 0.1
            tensors[f"{module}.lora_B.weight"] = torch.randn(rows, 3, generator=random) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", *leaves], task_type="CAUSAL_LM")
    config.save_pretrained(folder)
    assert load_config(source)["model_type"]
