"""The generator of checkpoints of any size: what it writes is a checkpoint, of the shapes asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.layout import Shape, gpt_oss_20b, tensor_shapes
from benchmarks.make_checkpoint import into_shards, main, make_checkpoint, nbytes, tensors_of
from moe_surgery import inspect, plan_keeping, prune, verify
from tests.support.checkpoints import INDEX, kept_tensors, load_config, load_tensors

SHAPE = Shape(layers=3, vocabulary=40)


@pytest.mark.parametrize("shards", [1, 3])
def test_it_writes_the_tensors_of_the_shape(shards: int, tmp_path: Path) -> None:
    total = make_checkpoint(tmp_path / "out", SHAPE, shards)
    tensors = load_tensors(tmp_path / "out")
    assert {name: value.shape for name, value in tensors.items()} == tensor_shapes(SHAPE)
    assert sum(value.nbytes for value in tensors.values()) == total
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == shards
    assert set(json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]) == set(tensors)
    for name, value in tensors.items():
        if value.dtype == np.uint16:  # BF16: no infinity, no NaN
            assert ((value >> 7) & 0xFF).max() < 0xFF, name


def test_it_can_be_pruned(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "in", SHAPE, 2)
    prune(tmp_path / "in", tmp_path / "out", lambda model: plan_keeping([1, 3], model))
    assert verify(tmp_path / "out", source=tmp_path / "in").ok
    expected = kept_tensors(load_tensors(tmp_path / "in"), [[1, 3]] * SHAPE.layers)
    written = load_tensors(tmp_path / "out")
    assert all(written[name].tobytes() == value.tobytes() for name, value in expected.items())


def test_the_command_takes_every_dimension(tmp_path: Path) -> None:
    dimensions = {
        "layers": 1,
        "hidden": 64,
        "intermediate": 32,
        "vocabulary": 24,
        "experts": 8,
        "sliding-window": 16,
    }
    arguments = [f"--{name}={value}" for name, value in dimensions.items()]
    done = CliRunner().invoke(main, [str(tmp_path / "out"), *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    model = inspect(tmp_path / "out")
    assert (model.layers, model.experts) == (1, 8)
    assert load_config(tmp_path / "out")["sliding_window"] == 16


def test_full_size_is_gpt_oss_20b_in_three_shards() -> None:
    """459 tensors, 13.76 GB: as published."""
    tensors = tensors_of(gpt_oss_20b())
    assert (len(tensors), sum(map(nbytes, tensors))) == (459, 13_761_264_768)
    shards = into_shards(tensors, 3)
    assert [tensor for shard in shards for tensor in shard] == tensors
    sizes = [sum(map(nbytes, shard)) for shard in shards]
    assert max(sizes) < 1.2 * min(sizes)
