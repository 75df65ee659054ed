"""Keeping everything changes nothing, and conversions are exact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from moe_surgery import plan_keeping, plan_random, prune
from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.families.model_spec import ModelSpec
from moe_surgery.selection.plan import Plan
from tests.support.checkpoints import (
    INDEX,
    Shape,
    assert_same_tensors,
    kept_tensors,
    load_config,
    load_tensors,
    make_config,
    make_tensors,
    to_bf16,
    write_checkpoint,
    write_folder,
)

ODD = Shape(
    layers=3, experts=5, top_k=3, hidden=96, intermediate=160, heads=3, kv_heads=1, head_dim=7, vocabulary=17
)
UNPACKABLE = Shape(
    layers=2, experts=3, top_k=1, hidden=33, intermediate=7, heads=3, kv_heads=3, head_dim=5, vocabulary=11
)
MANY = Shape(layers=1, experts=1024, top_k=8, hidden=32, intermediate=32, heads=1, kv_heads=1, head_dim=2)


def keep_all(model: ModelSpec) -> Plan:
    return plan_keeping(None, model)


# shape, layout, shards, index (None: where there are several shards)
SOURCES: Mapping[str, tuple[Shape, str, int, bool | None]] = {
    "one file": (Shape(), "mxfp4", 1, None),
    "one file with an index": (Shape(), "mxfp4", 1, True),
    "scattered over 7 shards": (Shape(), "mxfp4", 7, None),
    "several shards, no index": (Shape(), "mxfp4", 4, False),
    "a tensor a shard": (Shape(layers=1), "mxfp4", 100, None),
    "one expert": (Shape(experts=1, top_k=1), "mxfp4", 2, None),
    "1024 experts": (MANY, "mxfp4", 2, None),
    "one layer": (Shape(layers=1), "mxfp4", 1, None),
    "odd dimensions": (ODD, "mxfp4", 3, None),
    "bf16": (ODD, "bf16", 3, None),
    "bf16, no whole blocks": (UNPACKABLE, "bf16", 2, None),
}


@pytest.mark.parametrize("case", SOURCES)
def test_keeping_all_experts_gives_every_tensor_byte_for_byte(case: str, tmp_path: Path) -> None:
    shape, layout, shards, index = SOURCES[case]
    source = write_checkpoint(tmp_path / "in", shape, layout, shards=shards, index=index)
    prune(source, tmp_path / "out", keep_all)
    assert_same_tensors(load_tensors(tmp_path / "out"), load_tensors(source))
    assert load_config(tmp_path / "out") == load_config(source)
    assert list(load_config(tmp_path / "out")) == list(load_config(source))


@pytest.mark.parametrize("size", [1, 100_000, 1_000_000, 10**9])
def test_keeping_all_experts_of_the_tiny_model_gives_it_back_at_any_shard_size(
    size: int, tmp_path: Path
) -> None:
    with Checkpoint.open("example:tiny") as tiny:
        source = tiny.path
    prune("example:tiny", tmp_path / "out", keep_all, max_shard_size=size)
    assert_same_tensors(load_tensors(tmp_path / "out"), load_tensors(source))
    assert (tmp_path / "out" / INDEX).exists() == (size < 10**9)


def test_names_of_a_model_saved_again_by_transformers_become_the_hubs(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", ODD, "resaved", shards=3)
    prune(source, tmp_path / "out", keep_all)
    assert_same_tensors(load_tensors(tmp_path / "out"), make_tensors(ODD, "bf16"))
    assert load_config(tmp_path / "out") == load_config(source)


def test_side_files_arrive_byte_for_byte(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in")
    prune(source, tmp_path / "out", keep_all)
    for name in ("generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert (tmp_path / "out" / "README.source.md").read_bytes() == (source / "README.md").read_bytes()


@pytest.mark.parametrize(
    "shape",
    [Shape(), ODD, Shape(hidden=32, intermediate=96), Shape(layers=1, hidden=544, intermediate=288)],
    ids=str,
)
def test_bf16_is_what_transformers_dequantises_of_every_kept_expert(shape: Shape, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    tensors = make_tensors(shape, scales=(1, 252))  # beyond these the product may leave BF16
    source = write_folder(tmp_path / "in", tensors, make_config(shape), shards=4)
    result = prune(
        source, tmp_path / "out", lambda m: plan_random(shape.experts // 2 + 1, 3, m), store="bf16"
    )

    kept = kept_tensors(tensors, result.program.plan.layers)
    got = load_tensors(tmp_path / "out")
    for name in [n for n in kept if n.endswith("_blocks")]:
        base = name.removesuffix("_blocks")
        blocks, scales = (torch.from_numpy(kept[base + suffix]) for suffix in ("_blocks", "_scales"))
        expected = convert(blocks, scales).view(torch.uint16).numpy()
        assert got[base].shape == expected.shape
        assert np.array_equal(got[base], expected)
    assert_same_tensors(got, to_bf16(kept))


@pytest.mark.parametrize("scales", [(114, 122), (0, 252)], ids=["usual scales", "all scales that are finite"])
@pytest.mark.parametrize("shape", [Shape(), ODD], ids=["even", "odd"])
def test_bf16_to_mxfp4_to_bf16_gives_the_same_bits(
    shape: Shape, scales: tuple[int, int], tmp_path: Path
) -> None:
    tensors = to_bf16(make_tensors(shape, scales=scales))
    source = write_folder(tmp_path / "bf16", tensors, make_config(shape, "bf16"), shards=3)
    there = prune(source, tmp_path / "mxfp4", keep_all, store="mxfp4")
    prune(tmp_path / "mxfp4", tmp_path / "again", keep_all, store="bf16")
    assert_same_tensors(load_tensors(tmp_path / "again"), tensors)
    assert load_config(tmp_path / "again") == load_config(source)
    assert there.outcome is not None
    assert there.outcome.conversion is not None
    assert there.outcome.conversion["inexact_blocks"] == 0


def test_mxfp4_to_bf16_to_mxfp4_gives_blocks_that_decode_to_the_same(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "mxfp4", ODD, shards=2)
    prune(source, tmp_path / "bf16", keep_all, store="bf16")
    prune(tmp_path / "bf16", tmp_path / "again", keep_all, store="mxfp4")
    got, expected = load_tensors(tmp_path / "again"), load_tensors(source)
    assert sorted(got) == sorted(expected)
    assert_same_tensors(to_bf16(got), to_bf16(expected))
    assert load_config(tmp_path / "again") == load_config(source)


def test_quantization_config_leaves_with_bf16_and_enters_with_mxfp4_in_its_place(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "mxfp4")
    prune(source, tmp_path / "bf16", keep_all, store="bf16")
    without = {k: v for k, v in load_config(source).items() if k != "quantization_config"}
    assert load_config(tmp_path / "bf16") == without
    prune(tmp_path / "bf16", tmp_path / "again", keep_all, store="mxfp4")
    assert list(load_config(tmp_path / "again")) == list(load_config(source))
