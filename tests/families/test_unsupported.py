"""Errors for checkpoints that no family matches say what they are and what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.families.refusal import refusal
from tests.support.checkpoints import Shape, Tensors, load_config, write_checkpoint
from tests.support.command import call, untouched

Capture = pytest.CaptureFixture[str]
SHAPE = Shape(layers=1)
EXPERTS = "model.layers.0.mlp.experts."
BF16 = np.uint16


# --- saved by transformers itself


def saved(folder: Path, name: str, **settings: object) -> Path:
    """A tiny model of the transformers class `name`, as its save_pretrained writes it."""
    transformers = pytest.importorskip("transformers")
    model_class = getattr(transformers, name)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
    config = model_class.config_class(**sizes, **settings)
    model_class(config).save_pretrained(folder)
    return folder


SAVED: dict[str, tuple[dict[str, object], str]] = {
    "GptOssForSequenceClassification": (
        {"num_local_experts": 4, "num_experts_per_tok": 2, "num_labels": 3},
        r"is GptOssForSequenceClassification: it has score\.weight with 3 labels instead of lm_head\.weight; "
        r"only gpt-oss language models \(CausalLM\)",
    ),
    "GptOssForTokenClassification": (
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        r"is GptOssForTokenClassification: it has score\.weight with 2 labels",
    ),
    "GptOssModel": ({"num_local_experts": 4, "num_experts_per_tok": 2}, r"is a bare gpt-oss model without"),
    "LlamaForCausalLM": ({}, r"is a llama checkpoint \(LlamaForCausalLM\); supported model_type: gpt_oss"),
}


@pytest.mark.parametrize("name", SAVED)
def test_what_transformers_saves_of_another_class_is_named(name: str, tmp_path: Path) -> None:
    settings, expected = SAVED[name]
    folder = saved(tmp_path / "model", name, **settings)
    message = refusal(folder)
    assert re.search(expected, message), message
    config = load_config(folder)
    if config.get("model_type") == "gpt_oss":  # by its tensors alone
        del config["architectures"]
        (folder / "config.json").write_text(json.dumps(config))
        assert "is missing" not in refusal(folder)


def test_a_family_without_model_type_is_recognised_by_its_tensors(tmp_path: Path) -> None:
    for name, expected, settings in (
        ("MixtralForCausalLM", "Mixtral", {"num_local_experts": 4}),
        ("Qwen3MoeForCausalLM", "Qwen-MoE", {"num_experts": 4, "moe_intermediate_size": 16}),
    ):
        folder = saved(tmp_path / name, name, **settings)
        config = load_config(folder)
        del config["architectures"], config["model_type"]
        (folder / "config.json").write_text(json.dumps(config))
        assert f"a {expected}-like" in refusal(folder)


# --- other layouts of gpt-oss, and quantised ones


def replace_experts(names: dict[str, tuple[int, ...]]) -> Callable[[Tensors], None]:
    """Replace the stacked expert weights by tensors of these names and shapes."""

    def edit(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(EXPERTS)]:
            del tensors[name]
        tensors.update({EXPERTS + name: np.zeros(shape, BF16) for name, shape in names.items()})

    return edit


APART, TOGETHER = "stores gate and up projections separately", "stores every expert in separate tensors"
LAYOUTS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "split": ({"gate_proj": (4, 64, 32), "up_proj": (4, 64, 32), "down_proj": (4, 32, 64)}, APART),
    "split weights": ({"gate_proj.weight": (4, 32, 64), "up_proj.weight": (4, 32, 64)}, APART),
    "split blocks": ({"gate_proj_blocks": (4, 32, 2, 16), "up_proj_blocks": (4, 32, 2, 16)}, APART),
    "per expert": ({f"{e}.gate_up_proj": (64, 64) for e in range(4)}, TOGETHER),
    "per expert split": (
        {f"{e}.{p}_proj.weight": (32, 64) for e in range(4) for p in ("gate", "up", "down")},
        TOGETHER,
    ),
    "lists": ({f"gate_up_projs.{e}.weight": (64, 64) for e in range(4)}, TOGETHER),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_another_layout_of_experts_is_named_and_no_shard_called_missing(case: str, tmp_path: Path) -> None:
    names, expected = LAYOUTS[case]
    message = refusal(write_checkpoint(tmp_path / "in", SHAPE, shards=2, edit_tensors=replace_experts(names)))
    assert expected in message
    assert "mlp.experts.gate_up_proj" in message
    assert "missing" not in message
    assert "cut" not in message


QUANTISED: dict[str, tuple[str | None, dict[str, tuple[int, ...]], str]] = {
    "bitsandbytes": ("bitsandbytes", {"gate_up_proj": (64, 1)}, "quant_method 'bitsandbytes'"),
    "awq": ("awq", {"0.gate_proj.qweight": (64, 4)}, "quant_method 'awq'"),
    "gptq": ("gptq", {"0.gate_proj.qweight": (8, 32)}, "quant_method 'gptq'"),
    "fp8": ("fp8", {"gate_up_proj": (4, 64, 64)}, "quant_method 'fp8'"),
    "AWQ without config": (None, {"0.gate_proj.qweight": (64, 4)}, "quantised as AWQ or GPTQ"),
    "FP8 without config": (None, {"gate_up_proj_scale_inv": (4, 1, 1)}, "quantised as FP8"),
    "packed without config": (None, {"0.up_proj.weight_packed": (4, 4)}, "quantised as compressed-tensors"),
    "4 bits without config": (None, {"0.up_proj.weight.absmax": (4,)}, "quantised as bitsandbytes"),
}


@pytest.mark.parametrize("case", QUANTISED)
def test_other_quantisations_are_named(case: str, tmp_path: Path) -> None:
    method, names, expected = QUANTISED[case]
    message = refusal(
        write_checkpoint(
            tmp_path / "in",
            SHAPE,
            "bf16",
            edit_tensors=replace_experts(names),
            edit_config=lambda c: c.update(
                {"quantization_config": {"quant_method": method}} if method else {}
            ),
        )
    )
    assert expected in message
    assert (
        "is not supported (experts may be MXFP4 or unquantised); use the checkpoint it was made from"
        in message
    )


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_a_saved_training_wrapper_is_named(prefix: str, tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    message = refusal(write_checkpoint(tmp_path / "in", SHAPE, edit_tensors=rename))
    assert f"tensor names begin with {prefix!r}" in message


def test_a_missing_tensor_is_reported_as_missing(tmp_path: Path) -> None:
    name = EXPERTS + "down_proj_bias"
    for shards, expected in (
        (1, "a file is missing, or the checkpoint was saved without it"),
        (2, "does not list it either"),
    ):
        source = write_checkpoint(
            tmp_path / str(shards), SHAPE, shards=shards, edit_tensors=lambda t: t.pop(name)
        )
        message = refusal(source)
        assert f"tensor '{name}' is missing; " in message
        assert expected in message


# --- folders without safetensors

FOLDERS: dict[str, tuple[list[str], str]] = {
    "GGUF": (
        ["model-Q4.gguf"],
        "it holds model-Q4.gguf: a GGUF file; pass that to inspect, plan, prune or verify",
    ),
    "PyTorch": (["config.json", "pytorch_model.bin"], "it holds pytorch_model.bin: PyTorch files (pickle)"),
    "pt": (["model.pt"], "it holds model.pt: PyTorch files (pickle)"),
    "consolidated": (["consolidated.00.pth", "params.json"], "it holds consolidated.00.pth: PyTorch files"),
    "distributed": (
        ["__0_0.distcp", ".metadata"],
        "it holds __0_0.distcp: a distributed training checkpoint",
    ),
    "adapter": (["adapter_config.json", "adapter_model.safetensors"], "it holds a PEFT adapter, not a whole"),
    "original": (
        ["original/config.json", "original/model.safetensors"],
        "original/ inside it is a checkpoint",
    ),
    "training": (
        ["config.json", "checkpoint-20/config.json", "checkpoint-20/model.safetensors"],
        "checkpoint-20/ inside it is a checkpoint: pass that",
    ),
    "hub cache": (["snapshots/abc/config.json", "refs/main", "blobs/x"], "it is a folder of the hub cache"),
    "empty": ([], "config.json: not found; a checkpoint needs its config.json next to the shards"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_of_another_format_is_named(case: str, tmp_path: Path, capsys: Capture) -> None:
    files, expected = FOLDERS[case]
    folder = tmp_path / "model"
    folder.mkdir()
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    with untouched(folder):
        ended = call(capsys, "inspect", folder)
    assert (ended.code, ended.out) == (5, "")
    assert expected in ended.error
