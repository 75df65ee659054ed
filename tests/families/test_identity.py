"""The identity of a model does not depend on its sharding."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_surgery import Checkpoint, families
from moe_surgery.families.identity import identity
from tests.support.checkpoints import LAYOUTS, Shape, load_tensors, make_config, make_tensors, write_folder

SHAPE = Shape(layers=3, experts=4)


def of(folder: Path) -> str:
    with Checkpoint.open(folder) as opened:
        return identity(opened, families.identify_model(opened))


def written(folder: Path, layout: str = "mxfp4", *, shards: int = 1, flip: str = "", seed: int = 0) -> Path:
    """A checkpoint; the last bit of the last byte of the tensor `flip` is changed."""
    tensors = make_tensors(SHAPE, layout)
    if flip:
        raw = tensors[flip].reshape(-1).view("u1")
        raw[-1 if raw.itemsize == tensors[flip].itemsize else -2] ^= 1
    return write_folder(folder, tensors, make_config(SHAPE, layout), shards=shards, seed=seed)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_weights_in_other_shards_are_the_same_model(layout: str, tmp_path: Path) -> None:
    one = of(written(tmp_path / "one", layout))
    assert len(one) == 32
    for shards in (2, 5):
        folder = written(tmp_path / str(shards), layout, shards=shards, seed=shards)
        assert len(list(folder.glob("*.safetensors"))) == shards
        assert of(folder) == one


@pytest.mark.parametrize("tensor", ["mlp.router.weight", "mlp.router.bias"])
@pytest.mark.parametrize("layer", [0, 2])
def test_another_router_is_another_model(layer: int, tensor: str, tmp_path: Path) -> None:
    plain = written(tmp_path / "plain", shards=2)
    changed = written(tmp_path / "changed", shards=2, flip=f"model.layers.{layer}.{tensor}")
    assert [
        a.tobytes() != b.tobytes() for a, b in zip(*map(sorted_values, (plain, changed)), strict=True)
    ].count(True) == 1
    assert of(plain) != of(changed)


def sorted_values(folder: Path):  # type: ignore[no-untyped-def]
    return [value for _, value in sorted(load_tensors(folder).items())]


def test_a_router_of_the_original_layout_counts_too(tmp_path: Path) -> None:
    plain = of(written(tmp_path / "plain", "original"))
    assert of(written(tmp_path / "changed", "original", flip="block.1.mlp.gate.weight")) != plain


def test_other_storage_is_another_model(tmp_path: Path) -> None:
    assert len({of(written(tmp_path / layout, layout)) for layout in LAYOUTS}) == len(LAYOUTS)


def test_other_shapes_are_other_models(tmp_path: Path) -> None:
    result = set()
    for n, shape in enumerate((SHAPE, Shape(layers=3, experts=4, vocabulary=25), Shape(layers=2, experts=4))):
        folder = write_folder(tmp_path / str(n), make_tensors(shape), make_config(shape))
        result.add(of(folder))
    assert len(result) == 3
