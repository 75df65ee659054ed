"""The numbers of `inspect`: gpt-oss-20b from its headers, small checkpoints by counting bytes."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from moe_surgery import Checkpoint, identify_model, inspect, plan_random, prune
from tests.support.checkpoints import (
    LAYOUTS,
    Shape,
    gpt_oss_20b,
    load_tensors,
    write_checkpoint,
    write_sparse_checkpoint,
)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sparse_checkpoint(tmp_path_factory.mktemp("full") / "gpt-oss-20b", gpt_oss_20b())


def test_gpt_oss_20b_has_its_published_tensors_and_bytes(full_size: Path) -> None:
    result = inspect(full_size)
    assert (result.tensors, result.nbytes) == (459, 13_761_264_768)
    assert (result.layers, result.experts, result.top_k, result.expert_format.name) == (24, 32, 4, "mxfp4")
    assert sum(result.parts.values()) == sum(result.dtypes.values()) == result.nbytes


def test_parameters_of_every_size_are_those_in_the_names_of_the_published_models(full_size: Path) -> None:
    result = inspect(full_size)
    billions = {s.experts: round(s.parameters / 1e9, 1) for s in result.sizes}
    assert {n: billions[n] for n in (4, 8, 16, 31, 32)} == {4: 4.2, 8: 6.6, 16: 11.4, 31: 20.3, 32: 20.9}
    assert [s.experts for s in result.sizes] == list(range(1, 33))
    assert round(result.parameters_per_expert / 1e6, 1) == 597.4
    assert result.sizes[-1].parameters == result.parameters
    assert result.sizes[-1].mxfp4_bytes == result.nbytes
    # The model card's 3.6 billion active ones leave out the embedding table, of which a token reads a row.
    assert round((result.active_parameters - 201088 * 2880) / 1e9, 1) == 3.6


def test_active_parameters_stop_growing_at_top_k_but_for_router_rows(full_size: Path) -> None:
    sizes = inspect(full_size).sizes
    router_row = 24 * (2880 + 1)
    assert [s.active_parameters == s.parameters for s in sizes] == [s.experts <= 4 for s in sizes]
    steps = {b.active_parameters - a.active_parameters for a, b in pairwise(sizes[3:])}
    assert steps == {router_row}


def test_the_most_experts_that_fit_a_memory_size_are_found(full_size: Path) -> None:
    result = inspect(full_size)
    for gigabytes, fits in result.fits.items():
        for storage, most in fits.items():
            assert most is not None
            nbytes = [s.mxfp4_bytes if storage == "mxfp4" else s.bf16_bytes for s in result.sizes]
            assert nbytes[most - 1] <= gigabytes * 10**9
            assert most == 32 or nbytes[most] > gigabytes * 10**9


def test_memory_too_small_for_one_expert_fits_none(tmp_path: Path) -> None:
    huge = Shape(layers=20, experts=2, top_k=1, hidden=20480, intermediate=20480, vocabulary=100_000)
    result = inspect(write_sparse_checkpoint(tmp_path / "huge", huge, shards=2))
    assert result.fits[8] == {"mxfp4": None, "bf16": None}


@pytest.mark.parametrize("experts", [1, 4, 31])
@pytest.mark.parametrize("dtype", ["keep", "bf16"])
def test_inspect_foretells_what_prune_writes(
    dtype: str, experts: int, full_size: Path, tmp_path: Path
) -> None:
    size = inspect(full_size).sizes[experts - 1]
    program = prune(
        full_size, tmp_path / "out", lambda m: plan_random(experts, 0, m), store=dtype, dry_run=True
    ).program
    planned = sum(t.nbytes for s in program.shards for t in s.tensors)
    assert planned == (size.bf16_bytes if dtype == "bf16" else size.mxfp4_bytes)
    assert program.parameters == size.parameters
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_small_checkpoint_is_counted_tensor_by_tensor(layout: str, tmp_path: Path) -> None:
    shape = Shape(layers=3, experts=5, hidden=96, heads=3, vocabulary=7)
    source = write_checkpoint(tmp_path / "in", shape, layout, shards=3)
    result = inspect(source)
    tensors = load_tensors(source)
    assert (result.tensors, result.nbytes) == (len(tensors), sum(t.nbytes for t in tensors.values()))
    assert result.layout == ("original" if layout == "original" else "hub")
    assert result.shards == {f.name: f.stat().st_size for f in source.glob("*.safetensors")}
    weights = [t for n, t in tensors.items() if "blocks" not in n and "scales" not in n]
    packed = [t for n, t in tensors.items() if "blocks" in n]
    values = sum(t.size for t in weights) + sum(t.size * (2 if t.dtype == "uint8" else 1) for t in packed)
    assert result.parameters == values


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_of_a_pruned_model_are_those_foretold(layout: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", Shape(experts=5), layout)
    sizes = inspect(source).sizes
    for experts in (1, 3, 5):
        out = tmp_path / str(experts)
        prune(source, out, lambda m, n=experts: plan_random(n, 0, m))  # type: ignore[misc]
        result = inspect(out)
        size = sizes[experts - 1]
        stored = size.mxfp4_bytes if result.expert_format.name == "mxfp4" else size.bf16_bytes
        assert (result.parameters, result.nbytes) == (size.parameters, stored)
        assert result.active_parameters == size.active_parameters


def test_the_json_form_holds_every_number(tmp_path: Path) -> None:
    result = inspect(write_checkpoint(tmp_path / "in"))
    document = json.loads(json.dumps(result.as_dict()))
    assert document["parameters"] == result.parameters
    assert [s["parameters"] for s in document["sizes"]] == [s.parameters for s in result.sizes]


def test_tensors_come_in_the_order_of_the_model(tmp_path: Path) -> None:
    with Checkpoint.open(write_checkpoint(tmp_path / "in", Shape(layers=2), shards=4)) as checkpoint:
        names = [t.name for t in identify_model(checkpoint).tensors]
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    layers = [int(n.split(".")[2]) for n in names if ".layers." in n]
    assert layers == sorted(layers)
