"""DeepSeek-V4's tables of experts by token: renumbered, dropped experts replaced by kept ones."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from moe_surgery import Plan, prune, verify
from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.engine.chunks import chunks_of
from moe_surgery.errors import InvalidInputError, PlanMismatchError
from moe_surgery.families import identify_model
from moe_surgery.surgery.compiler import compile_program
from moe_surgery.surgery.producer import producer_of
from tests.support.per_expert import read, rows, write
from tests.support.routing_tables import (
    CODES,
    CONFIG,
    EXPERTS,
    TABLE,
    TOP_K,
    VOCABULARY,
    model,
    values,
)

KEPT = ((6, 1, 4, 0), (7, 2, 3, 5))


@pytest.mark.parametrize("dtype", CODES)
def test_kept_experts_stay_and_others_become_kept_ones_that_the_row_lacks(dtype: str, tmp_path: Path) -> None:
    tensors = model(dtype)
    source = write(tmp_path / "in", tensors, CONFIG, shards=2)
    prune(source, tmp_path / "out", Plan("deepseek_v4", EXPERTS, KEPT))
    found = read(tmp_path / "out")
    assert found["layers.1.ffn.gate.bias"] == rows(tensors["layers.1.ffn.gate.bias"], KEPT[1])
    assert found["layers.0.ffn.experts.2.w1.scale"] == tensors["layers.0.ffn.experts.4.w1.scale"]
    dropped = 0
    for old, new in zip(values(tensors[TABLE]), values(found[TABLE]), strict=True):
        assert len(set(new)) == TOP_K
        assert all(0 <= e < len(KEPT[0]) for e in new)
        for before, after in zip(old, new, strict=True):
            dropped += before not in KEPT[0]
            assert before not in KEPT[0] or KEPT[0][after] == before
    assert dropped > VOCABULARY
    assert verify(tmp_path / "out", source=source).problems == ()


@pytest.mark.parametrize("nbytes", [1, 7, 13, 64, 1000])
def test_a_table_is_the_same_in_pieces_of_any_size(nbytes: int, tmp_path: Path) -> None:
    source = write(tmp_path / "in", model(), CONFIG)
    with Checkpoint.open(source) as opened:
        program = compile_program(opened, identify_model(opened), Plan("deepseek_v4", EXPERTS, KEPT))
        (shard,) = program.shards
        whole, pieces = bytearray(), bytearray()
        for target, size in ((whole, 1 << 20), (pieces, nbytes)):
            for chunk in chunks_of(shard, size):
                buffer = bytearray(chunk.nbytes)
                producer_of(shard, opened.shards).fill(chunk, memoryview(buffer))
                target += buffer
    assert whole == pieces


def test_a_number_that_is_no_expert_is_refused(tmp_path: Path) -> None:
    tensors = model()
    dtype, shape, raw = tensors[TABLE]
    tensors[TABLE] = (dtype, shape, struct.pack("<q", EXPERTS) + raw[8:])
    source = write(tmp_path / "in", tensors, CONFIG)
    with pytest.raises(InvalidInputError, match=f"tensor '{TABLE}' holds 8, which is not an expert of 8"):
        prune(source, tmp_path / "out", Plan("deepseek_v4", EXPERTS, KEPT))
    assert not (tmp_path / "out").exists()


def test_a_row_needs_as_many_experts_as_it_has_columns(tmp_path: Path) -> None:
    source = write(tmp_path / "in", model(), CONFIG)
    with pytest.raises(PlanMismatchError, match="needs at least 3 experts in a layer"):
        prune(source, tmp_path / "out", Plan("deepseek_v4", EXPERTS, ((0, 1), (2, 3))))
