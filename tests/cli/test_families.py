"""Checkpoints of families other than gpt-oss at the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_surgery.errors import InvalidInputError
from tests.support import per_expert
from tests.support.command import call

Capture = pytest.CaptureFixture[str]

RANKING = {f"layer_{n}": [5, 4, 3, 2, 1, 0, 11, 10, 9, 8, 7, 6] for n in (1, 2, 3)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return per_expert.write(
        tmp_path / "source",
        per_expert.deepseek("fp8 block", mtp=True, experts=12),
        per_expert.config(mtp=True, experts=12, n_group=2, topk_group=1),
    )


def test_it_is_inspected_planned_pruned_verified_and_described(
    source: Path, tmp_path: Path, capsys: Capture
) -> None:
    shown = call(capsys, "inspect", source)
    assert "DeepSeek-V3 (deepseek_v3, per expert layout)" in shown.out
    assert "12 in each of 3 layers, top-2, from 1 of 2 groups, stored as F8_E4M3 and F32" not in shown.out
    assert "12 in each of 3 layers, top-2, from 1 of 2 groups, stored as F8_E4M3" in shown.out
    assert "1 layer is dense; model.layers.4 for multi-token prediction besides" in shown.out
    ranking, plan, out = tmp_path / "ranking.json", tmp_path / "plan.json", tmp_path / "out"
    ranking.write_text(json.dumps(RANKING))
    planned = call(capsys, "plan", ranking, source, "--experts", "5", "-o", plan)
    assert planned.code == 0, planned.err
    assert "keeping 4 experts instead of 5: 5 experts do not divide into the 2 groups" in planned.err
    document = json.loads(plan.read_text())
    assert document["layer_numbers"] == [1, 2, 3]
    assert document["layers"] == [[4, 5, 10, 11]] * 3
    pruned = call(capsys, "prune", source, out, "--plan", plan)
    assert pruned.code == 0, pruned.err
    assert (
        "model.layers.4 (multi-token prediction) keeps the experts with the largest router rows" in pruned.err
    )
    assert call(capsys, "verify", out, "--source", source).code == 0
    card = call(capsys, "card", out)
    assert card.code == 0
    assert card.out == (out / "README.md").read_text()
    assert "moe-surgery generate" not in card.out


def test_random_plans_take_the_same_number_of_each_group(source: Path, capsys: Capture) -> None:
    planned = call(capsys, "plan", source, "--random", "--experts", "6", "--seed", "3")
    assert "serving engines have no fused router for 6 experts; the nearest with one: 4 and 8" in planned.err
    for row in json.loads(planned.out)["layers"]:
        assert [e // 6 for e in row] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    "arguments",
    [
        ("profile", "CKPT", "--texts", "TEXT", "--generate", "8", "-o", "OUT"),
        ("trace", "CKPT", "--prompt", "some text", "-o", "OUT"),
        ("repair", "CKPT", "--source", "CKPT", "--texts", "TEXT", "-o", "OUT"),
        ("export", "CKPT", "OUT", "--no-tokenizer"),
    ],
)
def test_commands_that_need_the_runtime_say_that_they_support_gpt_oss_only(
    arguments: tuple[str, ...], source: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "text.txt").write_text("some text")
    named = {"CKPT": source, "TEXT": tmp_path / "text.txt", "OUT": tmp_path / "out.gguf"}
    ended = call(capsys, *(named.get(a, a) for a in arguments))
    assert ended.code == 3, ended.err
    assert "DeepSeek-V3 (deepseek_v3) checkpoints can be inspected, planned for, pruned" in ended.error
    assert "support gpt-oss only" in ended.error
    assert not (tmp_path / "out.gguf").exists()


def test_nor_are_they_loaded(source: Path) -> None:
    pytest.importorskip("torch")
    from moe_surgery import load_model

    with pytest.raises(InvalidInputError, match="support gpt-oss only"):
        load_model(source)


def test_the_card_counts_moe_layers_and_says_what_became_of_mtp_layers(
    source: Path, tmp_path: Path, capsys: Capture
) -> None:
    for options, expected in (
        ((), "those with the largest router rows"),
        (("--mtp", "drop"), "were left out."),
    ):
        out = tmp_path / f"out{len(options)}"
        assert call(capsys, "prune", source, out, "--keep", "0,1,6,7", *options).code == 0
        card = call(capsys, "card", out).out
        assert card == (out / "README.md").read_text()
        assert "each of its 3 MoE layers keeps 4 of 12 experts" in card
        assert expected in card
