"""Notes on the limits of serving engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_surgery import Plan, plan_keeping, prune
from moe_surgery.surgery.serving import serving_notes
from tests.support.checkpoints import Shape, write_checkpoint


@pytest.mark.parametrize(
    ("experts", "top_k", "source_top_k", "expected"),
    [
        (32, 4, 4, []),
        (16, 4, 4, []),
        (8, 4, 4, []),
        (4, 4, 4, ["do not divide by 8"]),
        (
            2,
            2,
            4,
            [
                "top-k is 2 instead of the source's 4: only 2 experts are left in each layer",
                "do not divide by 4, 8",
            ],
        ),
        (
            1,
            1,
            4,
            [
                "top-k is 1 instead of the source's 4: only 1 expert is left in each layer",
                "does not divide by 2, 4, 8",
            ],
        ),
        (
            3,
            3,
            4,
            ["top-k 3 is not a power of two", "top-k is 3", "divide by 2, 4, 8", "no fused router supports"],
        ),
        (31, 4, 4, ["do not divide by 2, 4, 8", "no fused router supports 31 experts"]),
        (24, 4, 4, ["no fused router supports 24 experts"]),
        (12, 4, 4, ["do not divide by 8", "no fused router supports"]),
    ],
)
def test_notes_name_the_limits_for_a_count(
    experts: int, top_k: int, source_top_k: int, expected: list[str]
) -> None:
    notes = serving_notes(experts, top_k, source_top_k)
    assert len(notes) == len(expected)
    for note, part in zip(notes, expected, strict=True):
        assert part in note
        assert "\n" not in note


def test_prune_gives_the_notes_of_its_result(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", Shape(experts=8, top_k=4))
    result = prune(source, tmp_path / "out", lambda m: plan_keeping([1, 2, 3], m))
    assert list(result.notes) == serving_notes(3, 3, 4)


@pytest.mark.parametrize(("store", "label"), [("keep", None), ("bf16", "BF16"), ("f16", "F16")])
def test_prune_and_card_say_what_mlx_lm_does_not_load(store: str, label: str | None, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", Shape(experts=8, top_k=4))
    result = prune(source, tmp_path / "out", lambda m: plan_keeping(range(8), m), store=store)
    notes = [note for note in result.notes if "mlx-lm" in note]
    assert len(notes) == (label is not None)
    assert all(f"experts stored as {label}" in note for note in notes)
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(note in card for note in notes)
    assert ("mlx-lm" in card) == (label is not None)


ASKED = "top-k is {} instead of the source's {}, as the plan sets it: a token passes through {} experts"
LEFT = "top-k is {} instead of {} {}: only {} left in each layer"


@pytest.mark.parametrize(
    ("kept", "plan_top_k", "top_k", "expected"),
    [
        (8, None, 4, None),
        (8, 4, 4, None),
        (8, 2, 2, ASKED.format(2, 4, "fewer")),
        (8, 8, 8, ASKED.format(8, 4, "more")),
        (16, 8, 8, ASKED.format(8, 4, "more")),
        (2, None, 2, LEFT.format(2, "the source's", 4, "2 experts are")),
        (1, None, 1, LEFT.format(1, "the source's", 4, "1 expert is")),
        (2, 1, 1, ASKED.format(1, 4, "fewer")),
        (2, 2, 2, ASKED.format(2, 4, "fewer")),
        (2, 3, 2, LEFT.format(2, "the plan's", 3, "2 experts are")),
        (8, 16, 8, LEFT.format(8, "the plan's", 16, "8 experts are")),
        (4, 8, 4, LEFT.format(4, "the plan's", 8, "4 experts are")),
    ],
)
def test_the_note_on_top_k_names_its_cause(
    kept: int, plan_top_k: int | None, top_k: int, expected: str | None, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "in", Shape(experts=16, top_k=4, layers=1))
    plan = Plan("gpt_oss", 16, (tuple(range(kept)),), plan_top_k)
    result = prune(source, tmp_path / "out", plan)
    assert result.program.top_k == top_k
    notes = [note for note in result.notes if "top-k is" in note]
    assert len(notes) == (expected is not None)
    assert all(note.startswith(str(expected)) for note in notes)
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(note in card for note in result.notes)
    assert card.count("top-k is") == len(notes)
    assert ("**Top-k changed.**" in card) == (top_k != 4)
    assert ("less than the model was trained with" in card) == (top_k < 4)
    assert ("more than the model was trained with" in card) == (top_k > 4)
    assert ("what is known about the source applies here" in card) == (kept == 16 and top_k == 4)
