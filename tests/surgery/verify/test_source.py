"""A checkpoint compared with its source."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from moe_surgery.errors import PlanMismatchError
from moe_surgery.surgery.verify import verify_checkpoint
from tests.support.checkpoints import Shape, load_tensors, write_checkpoint
from tests.surgery.verify.damage import (
    flip,
    header_of,
)

Capture = pytest.CaptureFixture[str]


def test_source_with_other_weights_names_each_tensor(source: Path, out: Path, tmp_path: Path) -> None:
    layout = "mxfp4" if "quantization_config" in (source / "config.json").read_text() else "bf16"
    other = write_checkpoint(tmp_path / "other", layout=layout, shards=2, seed=1)
    result = verify_checkpoint(out, source=other)
    named = {p.split("'")[1] for p in result.problems}
    assert named == set(load_tensors(out))
    assert all(p.endswith(f": differs from the kept experts of {other}") for p in result.problems)


def test_source_that_differs_in_one_kept_byte_is_found(source: Path, out: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(source, other)
    for shard in sorted(other.glob("*.safetensors")):
        *_, last = header_of(shard).tensors
        flip(shard, shard.stat().st_size - 1, 1)
        result = verify_checkpoint(out, source=other)
        # the last expert is kept; a weight may have been split in two, or joined from two
        assert {p.split("'")[1].removesuffix("_blocks").removesuffix("_scales") for p in result.problems} == {
            last.removesuffix("_blocks").removesuffix("_scales")
        }
        flip(shard, shard.stat().st_size - 1, 1)
    assert verify_checkpoint(out, source=other).ok


def test_source_of_another_shape_is_refused(out: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", Shape(experts=5))
    with pytest.raises(
        PlanMismatchError,
        match=r"not the source of .* 2 layers of 5 experts, the source is gpt_oss with 2 layers of 4",
    ):
        verify_checkpoint(out, source=other)


def test_source_with_another_layout_is_compared(source: Path, out: Path, tmp_path: Path) -> None:
    layout = "mxfp4" if "quantization_config" in (source / "config.json").read_text() else "bf16"
    other = write_checkpoint(tmp_path / "other", layout=layout, shards=5)
    result = verify_checkpoint(out, source=other)
    assert result.ok
    assert ["shards are laid out differently than in the source" in note for note in result.notes] == [True]
