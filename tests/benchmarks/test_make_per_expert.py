"""The generator of checkpoints that store each expert separately."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.make_per_expert import make_checkpoint
from moe_surgery import inspect
from tests.support.per_expert import read

SIZES = {"layers": 3, "experts": 8, "hidden": 256, "intermediate": 128}


@pytest.mark.parametrize(("fmt", "per_expert"), [("bf16", 3), ("fp8", 6)])
def test_it_writes_a_model_of_the_given_sizes(fmt: str, per_expert: int, tmp_path: Path) -> None:
    count, total = make_checkpoint(tmp_path / "in", fmt=fmt, shards=3, **SIZES)
    found = inspect(tmp_path / "in")
    assert (found.tensors, found.nbytes, len(found.shards)) == (count, total, 3)
    assert count == 3 + 3 * (6 + 8 * per_expert)
    assert (found.layers, found.experts, found.parameters_per_expert) == (3, 8, 3 * 3 * 256 * 128)
    tensors = read(tmp_path / "in")
    assert sum(len(raw) for _, _, raw in tensors.values()) == total
    assert len({raw for _, _, raw in tensors.values() if len(raw) > 100}) == sum(
        len(raw) > 100 for _, _, raw in tensors.values()
    )


def test_sparse_files_take_no_space(tmp_path: Path) -> None:
    _, total = make_checkpoint(tmp_path / "in", sparse=True, **SIZES)
    files = [f.stat() for f in (tmp_path / "in").glob("*.safetensors")]
    assert sum(f.st_size for f in files) > total
    assert sum(f.st_blocks for f in files) * 512 < total // 4
    assert os.listdir(tmp_path) == ["in"]
