"""Adapters on families of the catalogue: experts stored one by one or stacked, factors in the layouts PEFT has had."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_surgery import merge_adapter, plan_keeping, prune, verify
from moe_surgery.errors import MoeSurgeryError
from tests.support import per_expert
from tests.support.adapters import assert_rounded, factors, round_bf16, stacked_delta, write_adapter
from tests.support.checkpoints import Tensors
from tests.support.floats import as_float64
from tests.support.per_expert import EXPERTS, HIDDEN, INTERMEDIATE

MODULE = "model.layers.2.mlp.experts"
RANK = 3
SIZES = {
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}


def checkpoint(folder: Path, stacked: bool = False) -> Path:
    """A model whose experts have finite weights."""
    tensors = per_expert.deepseek()
    rng = np.random.default_rng(0)
    for name, (dtype, shape, _) in tensors.items():
        if ".experts." in name:
            bits = round_bf16(rng.normal(0, 0.1, shape))
            tensors[name] = (dtype, shape, bits.tobytes())
    if stacked:
        for layer in range(per_expert.DENSE, per_expert.LAYERS):
            stem = f"model.layers.{layer}.mlp.experts"
            parts = {
                leaf: [tensors.pop(f"{stem}.{e}.{leaf}.weight") for e in range(EXPERTS)] for leaf in SIZES
            }
            raw = b"".join(g[2] + u[2] for g, u in zip(parts["gate_proj"], parts["up_proj"], strict=True))
            tensors[f"{stem}.gate_up_proj"] = ("BF16", (EXPERTS, 2 * INTERMEDIATE, HIDDEN), raw)
            raw = b"".join(part[2] for part in parts["down_proj"])
            tensors[f"{stem}.down_proj"] = ("BF16", (EXPERTS, HIDDEN, INTERMEDIATE), raw)
    return per_expert.write(folder, tensors, per_expert.config())


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Expert weights of the adapted layer as BF16 bits [experts, rows, columns]: gate_up and down."""
    tensors = per_expert.read(folder)

    def bits(name: str) -> np.ndarray:
        return np.frombuffer(tensors[name][2], np.uint16).reshape(tensors[name][1])

    if f"{MODULE}.down_proj" in tensors:
        return {leaf: bits(f"{MODULE}.{leaf}") for leaf in ("gate_up_proj", "down_proj")}
    count = sum(name.startswith(MODULE) and name.endswith("down_proj.weight") for name in tensors)
    gate, up, down = (
        np.stack([bits(f"{MODULE}.{expert}.{leaf}.weight") for expert in range(count)]) for leaf in SIZES
    )
    return {"gate_up_proj": np.concatenate([gate, up], axis=1), "down_proj": down}


def adapter(folder: Path, version: str = "0.21.2") -> Tensors:
    """On both stacked parameters; before 0.19 PEFT took the stored axes of a parameter for its inputs and outputs."""
    shapes = {f"{MODULE}.base_layer": (HIDDEN, 2 * INTERMEDIATE), MODULE: (INTERMEDIATE, HIDDEN)}
    tensors: Tensors = {}
    for module, (inputs, outputs) in shapes.items():
        axes = (outputs, inputs) if version < "0.19" else (inputs, outputs)
        tensors |= factors(module, RANK * EXPERTS, *axes)
    write_adapter(folder, tensors, RANK, peft_version=version)
    return tensors


def down_only(folder: Path, version: str = "0.21.2") -> Tensors:
    axes = (HIDDEN, INTERMEDIATE) if version < "0.19" else (INTERMEDIATE, HIDDEN)
    tensors = factors(MODULE, RANK * EXPERTS, *axes)
    config = {"peft_version": version, "target_parameters": ["experts.down_proj"]}
    write_adapter(folder, tensors, RANK, **config)
    return tensors


def test_stacked_factors_on_experts_stored_one_by_one(tmp_path: Path) -> None:
    source, tensors = checkpoint(tmp_path / "in"), adapter(tmp_path / "lora")
    merge_adapter(tmp_path / "lora", source, tmp_path / "out")
    before, after = weights(source), weights(tmp_path / "out")
    for leaf, module in (("gate_up_proj", f"{MODULE}.base_layer"), ("down_proj", MODULE)):
        assert_rounded(after[leaf], as_float64(before[leaf]) + stacked_delta(tensors, module, EXPERTS))
    others = {n: t for n, t in per_expert.read(source).items() if not n.startswith(MODULE)}
    assert {n: t for n, t in per_expert.read(tmp_path / "out").items() if n in others} == others
    assert verify(tmp_path / "out", source=source, adapter=tmp_path / "lora").ok


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("version", ["0.18.0", "0.21.2"])
def test_both_layouts_of_pefts_factors(version: str, stacked: bool, tmp_path: Path) -> None:
    source, tensors = checkpoint(tmp_path / "in", stacked), down_only(tmp_path / "lora", version)
    merge_adapter(tmp_path / "lora", source, tmp_path / "out")
    added = stacked_delta(tensors, MODULE, EXPERTS)
    if version < "0.19":
        added = added.swapaxes(1, 2)  # "e i o" of a parameter [experts, outputs, inputs]
    before, after = weights(source), weights(tmp_path / "out")
    assert_rounded(after["down_proj"], as_float64(before["down_proj"]) + added)
    assert after["gate_up_proj"].tobytes() == before["gate_up_proj"].tobytes()


@pytest.mark.parametrize(("version", "stacked"), [("0.18.0", False), ("0.19.0", False), ("0.21.2", True)])
def test_a_square_parameter_of_unknown_layout_is_refused(version: str, stacked: bool, tmp_path: Path) -> None:
    """gate_up is [64, 64] here."""
    source = checkpoint(tmp_path / "in", stacked)
    adapter(tmp_path / "lora", version)
    with pytest.raises(MoeSurgeryError, match="is on a square parameter"):
        merge_adapter(tmp_path / "lora", source, tmp_path / "out")


def test_an_adapter_of_the_full_model_on_a_pruned_one(tmp_path: Path) -> None:
    kept = [4, 1, 2]
    source, tensors = checkpoint(tmp_path / "in"), adapter(tmp_path / "lora")
    prune(source, tmp_path / "pruned", lambda model: plan_keeping(kept, model))
    merge_adapter(tmp_path / "lora", tmp_path / "pruned", tmp_path / "out")
    before, after = weights(source), weights(tmp_path / "out")
    for leaf, module in (("gate_up_proj", f"{MODULE}.base_layer"), ("down_proj", MODULE)):
        wanted = as_float64(before[leaf]) + stacked_delta(tensors, module, EXPERTS)
        assert_rounded(after[leaf], wanted[kept])


def test_weights_in_fp8_are_refused(tmp_path: Path) -> None:
    source = per_expert.write(tmp_path / "in", per_expert.deepseek("fp8 block"), per_expert.config())
    down_only(tmp_path / "lora")
    with pytest.raises(MoeSurgeryError, match="is stored as F8_E4M3, to which nothing can be added"):
        merge_adapter(tmp_path / "lora", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
