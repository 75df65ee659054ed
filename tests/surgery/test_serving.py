"""Notes on what serving engines make of a pruned model."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_surgery import plan_keeping, prune
from moe_surgery.surgery.serving import serving_notes
from tests.support.checkpoints import Shape, write_checkpoint


@pytest.mark.parametrize(
    ("experts", "top_k", "source_top_k", "told"),
    [
        (32, 4, 4, []),
        (16, 4, 4, []),
        (8, 4, 4, []),
        (4, 4, 4, ["do not divide by 8"]),
        (2, 2, 4, ["top-k is 2 instead of 4", "do not divide by 4, 8"]),
        (1, 1, 4, ["top-k is 1 instead of 4", "does not divide by 2, 4, 8"]),
        (3, 3, 4, ["top-k 3 is not a power of two", "top-k is 3", "divide by 2, 4, 8", "no count"]),
        (31, 4, 4, ["do not divide by 2, 4, 8", "31 experts is no count that fused routers are built for"]),
        (24, 4, 4, ["24 experts is no count that fused routers are built for"]),
        (12, 4, 4, ["do not divide by 8", "no count"]),
    ],
)
def test_notes_tell_what_is_known_of_a_count(
    experts: int, top_k: int, source_top_k: int, told: list[str]
) -> None:
    notes = serving_notes(experts, top_k, source_top_k)
    assert len(notes) == len(told)
    for note, part in zip(notes, told, strict=True):
        assert part in note
        assert "\n" not in note


def test_prune_gives_the_notes_of_its_result(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", Shape(experts=8, top_k=4))
    result = prune(source, tmp_path / "out", lambda m: plan_keeping([1, 2, 3], m))
    assert list(result.notes) == serving_notes(3, 3, 4)
