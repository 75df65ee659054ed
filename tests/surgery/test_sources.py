"""A checkpoint whose shards have no descriptor and no mapping gives the same output byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_surgery import families
from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.families.identity import identity
from moe_surgery.pipeline import export_gguf, inspect, prune
from moe_surgery.selection.plan import plan_keeping
from moe_surgery.surgery.verify import verify_checkpoint

from ..support.checkpoints import Shape, write_checkpoint
from ..support.command import contents
from ..support.sources import MemoryFolder

SHAPE = Shape(2, 8, 4, 512, 256, 8, 2, 32, 128)
KEPT = [0, 2, 3, 7]


@pytest.mark.parametrize("dtype", ["keep", "bf16", "mxfp4", "f32"])
def test_inspect_prune_and_verify_over_bytes_in_memory(tmp_path: Path, dtype: str) -> None:
    layout = "bf16" if dtype in ("mxfp4", "f32") else "mxfp4"
    source = write_checkpoint(tmp_path / "source", SHAPE, layout, shards=3)
    held = MemoryFolder(source)
    options = {"store": dtype, "max_shard_size": 900_000}
    prune(source, tmp_path / "one", lambda m: plan_keeping(KEPT, m), **options)  # type: ignore[arg-type]
    expected = inspect(source).as_dict()
    with Checkpoint.open(source) as opened:
        known = identity(opened, families.identify_model(opened))
    for file in source.iterdir():
        file.unlink()

    assert inspect(held).as_dict() == expected
    with Checkpoint.open(held) as opened:
        assert identity(opened, families.identify_model(opened)) == known
    prune(held, tmp_path / "two", lambda m: plan_keeping(KEPT, m), **options)  # type: ignore[arg-type]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert sum(name.endswith(".safetensors") for name in contents(tmp_path / "two")) > 1
    assert verify_checkpoint(tmp_path / "two", source=held).ok
    assert sum(name.endswith(".safetensors") for name in held.opened) == 3


@pytest.mark.parametrize(("layout", "dtype"), [("mxfp4", "keep"), ("bf16", "keep"), ("bf16", "mxfp4")])
def test_export_over_bytes_in_memory(tmp_path: Path, layout: str, dtype: str) -> None:
    source = write_checkpoint(tmp_path / "source", SHAPE, layout, shards=3)
    held = MemoryFolder(source)
    export_gguf(source, tmp_path / "one.gguf", store=dtype, tokenizer=False, name="x")
    for file in source.iterdir():
        file.unlink()
    export_gguf(held, tmp_path / "two.gguf", store=dtype, tokenizer=False, name="x")
    assert (tmp_path / "two.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()
