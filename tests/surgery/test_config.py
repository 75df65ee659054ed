"""config.json of the output: the source's, except for the counts and the quantisation."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_surgery import plan_keeping, prune
from tests.support.checkpoints import (
    LAYOUTS,
    Shape,
    load_config,
    make_config,
    quantization_config,
    write_checkpoint,
)

SHAPE = Shape(experts=6, top_k=4)


def pruned_config(
    tmp_path: Path, layout: str, kept: list[int], dtype: str = "keep", **edits: object
) -> dict[str, object]:
    source = write_checkpoint(tmp_path / "in", SHAPE, layout, edit_config=lambda c: c.update(edits))
    prune(source, tmp_path / "out", lambda m: plan_keeping(kept, m), store=dtype)
    return load_config(tmp_path / "out")


@pytest.mark.parametrize("layout", ["mxfp4", "bf16", "resaved"])
@pytest.mark.parametrize("kept", [[0], [3, 1, 5], [5, 4, 3, 2, 1]], ids=len)
def test_only_the_counts_change_and_keys_keep_their_order(
    layout: str, kept: list[int], tmp_path: Path
) -> None:
    before = make_config(SHAPE, layout) | {"zebra": [1, {"b": 1, "a": 2}], "apple": "ä"}
    after = pruned_config(tmp_path, layout, kept, zebra=before["zebra"], apple=before["apple"])
    top_k = min(4, len(kept))
    counts = {"num_local_experts": len(kept), "num_experts_per_tok": top_k}
    if "experts_per_token" in before:
        counts["experts_per_token"] = top_k
    assert after == before | counts
    assert list(after) == list(before)


@pytest.mark.parametrize("spelling", ["num_experts_per_tok", "experts_per_token"])
def test_the_result_has_the_spelling_that_transformers_reads(spelling: str, tmp_path: Path) -> None:
    other = {"num_experts_per_tok", "experts_per_token"} - {spelling}
    source = write_checkpoint(tmp_path / "in", SHAPE, edit_config=lambda c: [c.pop(key) for key in other])
    prune(source, tmp_path / "out", lambda m: plan_keeping([1, 2], m))
    config = load_config(tmp_path / "out")
    assert config["num_experts_per_tok"] == 2
    assert config.get("experts_per_token", 2) == 2
    assert ("experts_per_token" in config) == (spelling == "experts_per_token")
    assert list(config) == sorted(config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantization_config_is_there_exactly_with_mxfp4(layout: str, tmp_path: Path) -> None:
    assert "quantization_config" not in pruned_config(tmp_path / "1", layout, [0, 1], "bf16")
    packed = pruned_config(tmp_path / "2", layout, [0, 1], "mxfp4")
    assert packed["quantization_config"] == quantization_config()


def test_a_quantization_config_of_the_source_stays_as_it_is(tmp_path: Path) -> None:
    own = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"], "more": 1}
    assert pruned_config(tmp_path, "mxfp4", [0], quantization_config=own)["quantization_config"] == own


def test_quantization_config_enters_in_alphabetical_place(tmp_path: Path) -> None:
    keys = list(pruned_config(tmp_path, "bf16", [0, 1], "mxfp4"))
    assert keys == sorted(keys)
    assert "quantization_config" in keys


def test_quantization_config_enters_last_where_keys_are_not_sorted(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", SHAPE, "bf16", edit_config=reverse)
    prune(source, tmp_path / "out", lambda m: plan_keeping([1, 2], m), store="mxfp4")
    assert list(load_config(tmp_path / "out")) == [*load_config(source), "quantization_config"]


def reverse(config: dict[str, object]) -> None:
    items = list(config.items())
    config.clear()
    config.update(reversed(items))


def test_the_original_layouts_config_becomes_the_hubs(tmp_path: Path) -> None:
    got = pruned_config(tmp_path, "original", [4, 0, 2])
    expected = make_config(SHAPE) | {"num_local_experts": 3, "num_experts_per_tok": 3, "experts_per_token": 3}
    # A vocabulary too small for gpt-oss's own special tokens has none.
    expected |= {"eos_token_id": None, "pad_token_id": None, "max_position_embeddings": 512 * 8}
    assert got == expected
    assert list(got) == sorted(got)
