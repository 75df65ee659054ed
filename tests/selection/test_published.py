"""The rankings published with the pruned gpt-oss-20b models, and the mapping files of those models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_surgery import load_ranking, plan_from_ranking, prune
from moe_surgery.surgery.compiler import expert_mapping
from tests.support.checkpoints import (
    Shape,
    assert_same_tensors,
    kept_tensors,
    load_tensors,
    write_checkpoint,
)

RANKINGS = Path(__file__).resolve().parents[3] / "shared" / "data" / "rankings"
DOMAINS = (
    "all",
    "health_or_medicine",
    "instruction_following",
    "law",
    "math",
    "safety",
    "science",
    "unsafety",
)
MADE_UP = {
    "layer_0": [4, 2, 0, 5, 1, 3],
    "layer_1": [3, 1, 2, 0, 4, 5],
    "layer_2": [5, 0, 4, 1, 3, 2],
}


def mapping_of(ranking: dict[str, list[int]], experts: int) -> dict[str, dict[str, int]]:
    """The mapping file of a published model, straight from its ranking."""
    return {
        str(layer): {str(old): new for new, old in enumerate(ranking[f"layer_{layer}"][:experts])}
        for layer in range(len(ranking))
    }


def check(path: Path, counts: range) -> None:
    raw = json.loads(path.read_text())
    ranking = load_ranking(path)
    for experts in counts:
        firsts = [raw[f"layer_{layer}"][:experts] for layer in range(len(raw))]
        plan = plan_from_ranking(ranking, experts, model_type="gpt_oss")
        assert [list(kept) for kept in plan.layers] == [sorted(first) for first in firsts]
        plan = plan_from_ranking(ranking, experts, model_type="gpt_oss", order="ranking")
        assert [list(kept) for kept in plan.layers] == firsts
        assert expert_mapping(plan) == mapping_of(raw, experts)


@pytest.mark.parametrize("domain", DOMAINS)
def test_published_rankings_give_the_kept_sets_and_mappings_of_their_models(domain: str) -> None:
    path = RANKINGS / f"{domain}.json"
    if not path.is_file():
        pytest.skip("the published rankings are not beside this repository")
    ranking = load_ranking(path)
    assert (ranking.num_experts, len(ranking.layers)) == (32, 24)
    check(path, range(4, 33))


def test_a_made_up_ranking_in_the_published_form_gives_its_kept_sets_and_mappings(tmp_path: Path) -> None:
    path = tmp_path / "made_up.json"
    path.write_text(json.dumps(MADE_UP))
    check(path, range(1, 7))


@pytest.mark.parametrize("experts", [1, 4, 6])
def test_a_model_pruned_in_rank_order_carries_the_published_mapping(experts: int, tmp_path: Path) -> None:
    path = tmp_path / "made_up.json"
    path.write_text(json.dumps(MADE_UP))
    source = write_checkpoint(tmp_path / "in", Shape(layers=3, experts=6), shards=2)
    ranking = load_ranking(path)
    prune(
        source,
        tmp_path / "out",
        lambda m: plan_from_ranking(ranking, experts, model_type=m.model_type, order="ranking"),
    )
    mapping = json.loads((tmp_path / "out" / "expert_mapping.json").read_text())
    assert mapping == mapping_of(MADE_UP, experts)
    firsts = [MADE_UP[f"layer_{layer}"][:experts] for layer in range(3)]
    assert_same_tensors(load_tensors(tmp_path / "out"), kept_tensors(load_tensors(source), firsts))
