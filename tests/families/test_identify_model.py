"""A checkpoint is identified, or refused in one line that names the file or the tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe_surgery import Checkpoint, identify_model, plan_keeping, prune
from tests.families.refusal import refusal
from tests.support.checkpoints import (
    LAYOUTS,
    Shape,
    Tensors,
    assert_same_tensors,
    load_tensors,
    make_tensors,
    write_checkpoint,
)

SHAPE = Shape(layers=1)
EXPERTS = "model.layers.0.mlp.experts."
ROUTER = "model.layers.0.mlp.router."


def broken(tmp_path: Path, layout: str, edit: Callable[[Tensors], object], shape: Shape = SHAPE) -> str:
    return refusal(write_checkpoint(tmp_path / "in", shape, layout, shards=2, edit_tensors=edit))


# --- every tensor

TENSORS = [(layout, name) for layout in LAYOUTS for name in make_tensors(SHAPE, layout)]


@pytest.mark.parametrize(("layout", "name"), TENSORS)
def test_a_missing_tensor_is_named(layout: str, name: str, tmp_path: Path) -> None:
    error = broken(tmp_path, layout, lambda tensors: tensors.pop(name))
    # Hub weights may be stored in two ways; where neither is there, the first is named.
    expected = f"{name}_blocks" if name.endswith(("gate_up_proj", "down_proj")) else name
    if name == "embedding.weight":  # by this one the original layout is recognised
        assert "config.json: unsupported model_type null (supported: gpt_oss and " in error
    else:
        assert f"tensor '{expected}' is missing" in error


def other_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Each axis one longer and one shorter, and one axis more or fewer."""
    changed = [(*shape[:i], n + d, *shape[i + 1 :]) for i, n in enumerate(shape) for d in (1, -1)]
    return [*changed, (*shape, 1), *([shape[1:]] if len(shape) > 1 else [])]


@pytest.mark.parametrize(("layout", "name"), TENSORS)
def test_a_tensor_of_another_shape_is_named_with_both_shapes(layout: str, name: str, tmp_path: Path) -> None:
    value = make_tensors(SHAPE, layout)[name]
    for number, shape in enumerate(other_shapes(value.shape)):
        error = broken(
            tmp_path / str(number),
            layout,
            lambda tensors, s=shape: tensors.update({name: np.zeros(s, value.dtype)}),  # type: ignore[misc]
        )
        assert f"tensor '{name}': shape {list(shape)}, expected {list(value.shape)} from config.json" in error


@pytest.mark.parametrize(("layout", "name"), TENSORS)
def test_a_tensor_of_another_dtype_is_named(layout: str, name: str, tmp_path: Path) -> None:
    value = make_tensors(SHAPE, layout)[name]
    weight = name.endswith(("gate_up_proj", "down_proj")) or (layout == "resaved" and "_blocks" in name)
    if name.endswith(("blocks", "scales")) and not weight:
        wrong, error = np.float32, "dtype F32, expected U8"
    else:
        wrong, error = np.uint8, "dtype U8, expected BF16 or F16 or F32"
    message = broken(tmp_path, layout, lambda t: t.update({name: np.zeros(value.shape, wrong)}))
    if weight and layout == "resaved":  # bytes under the name of the blocks are MXFP4, which needs scales
        assert f"tensor '{name.replace('_blocks', '_scales')}' is missing" in message
    else:
        assert f"tensor '{name}': {error}" in message


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_tensors_outside_the_expert_weights_may_be_of_any_float(
    layout: str, dtype: type, tmp_path: Path
) -> None:
    def widen(tensors: Tensors) -> None:
        for name, value in tensors.items():
            if "proj_blocks" not in name and not name.endswith(("gate_up_proj", "down_proj")):
                tensors[name] = value if value.dtype == np.uint8 else (value >> 8).astype(dtype)

    source = write_checkpoint(tmp_path / "in", SHAPE, layout, edit_tensors=widen)
    prune(source, tmp_path / "out", lambda m: plan_keeping(None, m))
    got = load_tensors(tmp_path / "out")
    assert got["model.norm.weight"].dtype == got[ROUTER + "bias"].dtype == dtype


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name",
    ["lm_head.bias", "model.layers.1.mlp.router.weight", "model.layers.0.mlp.experts.up_proj", ""],
)
def test_a_surplus_tensor_is_named(layout: str, name: str, tmp_path: Path) -> None:
    error = broken(tmp_path, layout, lambda tensors: tensors.update({name: np.zeros(3, np.uint16)}))
    assert f"tensor '{name}': is not part of a gpt_oss model of 1 layers (unexpected tensors: 1)" in error


def test_control_characters_of_a_surplus_name_are_escaped(tmp_path: Path) -> None:
    name = "a\x1b[2J\nb\u202e"
    error = broken(tmp_path, "mxfp4", lambda tensors: tensors.update({name: np.zeros(3, np.uint16)}))
    assert r"a\x1b[2J\nb\u202e" in error.replace("\\\\", "\\")


# --- blocks and scales


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def reshape(name: str, *shape: int) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: np.zeros(shape, tensors[name].dtype)})


# gate_up_proj_blocks is [4, 64, 2, 16], down_proj_blocks [4, 64, 1, 16].
DISAGREEING: Mapping[str, tuple[Callable[[Tensors], object], str]] = {
    "no scales": (drop(EXPERTS + "gate_up_proj_scales"), f"'{EXPERTS}gate_up_proj_scales' is missing"),
    "scales without blocks": (drop(EXPERTS + "down_proj_blocks"), f"'{EXPERTS}down_proj_blocks' is missing"),
    "a scale for two blocks": (
        reshape(EXPERTS + "gate_up_proj_scales", 4, 64, 1),
        "gate_up_proj_scales': shape [4, 64, 1], expected [4, 64, 2]",
    ),
    "scales with an axis of blocks": (
        reshape(EXPERTS + "gate_up_proj_scales", 4, 64, 2, 1),
        "gate_up_proj_scales': shape [4, 64, 2, 1], expected [4, 64, 2]",
    ),
    "blocks of 8 bytes": (
        reshape(EXPERTS + "gate_up_proj_blocks", 4, 64, 4, 8),
        "gate_up_proj_blocks': shape [4, 64, 4, 8], expected [4, 64, 2, 16]",
    ),
    "blocks without their last axis": (
        reshape(EXPERTS + "down_proj_blocks", 4, 64, 16),
        "down_proj_blocks': shape [4, 64, 16], expected [4, 64, 1, 16]",
    ),
    "fewer experts in the router's weight": (
        reshape(ROUTER + "weight", 3, 64),
        "router.weight': shape [3, 64], expected [4, 64]",
    ),
    "more experts in the router's bias": (
        reshape(ROUTER + "bias", 5),
        "router.bias': shape [5], expected [4]",
    ),
    "fewer experts in blocks": (
        reshape(EXPERTS + "gate_up_proj_blocks", 3, 64, 2, 16),
        "gate_up_proj_blocks': shape [3, 64, 2, 16], expected [4, 64, 2, 16]",
    ),
    "fewer experts in scales": (
        reshape(EXPERTS + "down_proj_scales", 3, 64, 1),
        "down_proj_scales': shape [3, 64, 1], expected [4, 64, 1]",
    ),
    "fewer experts in a bias": (
        reshape(EXPERTS + "down_proj_bias", 3, 64),
        "down_proj_bias': shape [3, 64], expected [4, 64]",
    ),
    "weights stored twice": (
        lambda tensors: tensors.update({EXPERTS + "down_proj": np.zeros((4, 32, 64), np.uint16)}),
        f"'{EXPERTS}down_proj': is not part of a gpt_oss model of 1 layers",
    ),
}


@pytest.mark.parametrize("case", DISAGREEING)
def test_blocks_scales_and_counts_that_disagree_are_named(case: str, tmp_path: Path) -> None:
    edit, error = DISAGREEING[case]
    assert error in broken(tmp_path, "mxfp4", edit)


def test_a_layer_with_other_experts_than_the_rest_is_named(tmp_path: Path) -> None:
    few = make_tensors(Shape(layers=2, experts=3))

    def edit(tensors: Tensors) -> None:
        tensors.update({k: v for k, v in few.items() if k.startswith("model.layers.1.mlp.")})

    error = broken(tmp_path, "mxfp4", edit, Shape(layers=2))
    assert "tensor 'model.layers.1.mlp.router.weight': shape [3, 64], expected [4, 64]" in error


def test_expert_weights_stored_in_two_ways_are_refused_naming_one_of_each(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        for suffix in ("_blocks", "_scales"):
            del tensors[EXPERTS + "down_proj" + suffix]
        tensors[EXPERTS + "down_proj"] = np.zeros((4, 32, 64), np.uint16)

    error = broken(tmp_path, "mxfp4", edit)
    assert f"'{EXPERTS}gate_up_proj_blocks' is stored as MXFP4" in error
    assert f"tensor '{EXPERTS}down_proj' as BF16: all expert weights must have the same format" in error


def test_blocks_that_no_dimension_fills_are_refused(tmp_path: Path) -> None:
    error = broken(tmp_path, "mxfp4", lambda tensors: None, replace(SHAPE, hidden=48))
    assert (
        f"tensor '{EXPERTS}gate_up_proj_blocks': 48 columns are not a multiple of the MXFP4 block size 32"
        in error
    )


def test_scales_may_lie_in_another_shard_than_their_blocks(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", SHAPE, shards=60)
    prune(source, tmp_path / "out", lambda m: plan_keeping(None, m))
    assert_same_tensors(load_tensors(tmp_path / "out"), load_tensors(source))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_described_as_one_model(layout: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", Shape(), layout, shards=3)
    with Checkpoint.open(source) as checkpoint:
        model = identify_model(checkpoint)
    assert (model.layers, model.experts, model.top_k) == (2, 4, 2)
    assert model.expert_format.name == ("mxfp4" if layout in ("mxfp4", "original") else "bf16")
    shapes = {t.name: t.shape for t in model.tensors}
    assert len(shapes) == 2 * 17 + 3
    assert shapes["model.layers.1.mlp.experts.gate_up_proj"] == (4, 64, 64)
    assert shapes["model.layers.1.mlp.experts.down_proj"] == (4, 64, 32)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (16, 64)
