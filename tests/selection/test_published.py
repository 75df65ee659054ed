"""The shipped rankings of the published gpt-oss-20b models, their plans and the mapping files of those models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import moe_surgery
from moe_surgery import Ranking, load_ranking, plan_from_ranking, prune
from moe_surgery.errors import UsageError
from moe_surgery.selection.published import interleave
from moe_surgery.selection.shipped import RANKINGS
from moe_surgery.surgery.compiler import expert_mapping
from tests.support.checkpoints import (
    Shape,
    assert_same_tensors,
    kept_tensors,
    load_tensors,
    write_checkpoint,
)

DATA = Path(moe_surgery.__file__).parent / "selection" / "data"
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
TOPICS = tuple(name for name in DOMAINS if name not in ("all", "unsafety"))
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


def check(ranking: Ranking, raw: dict[str, list[int]], counts: range) -> None:
    for experts in counts:
        firsts = [raw[f"layer_{layer}"][:experts] for layer in range(len(raw))]
        plan = plan_from_ranking(ranking, experts, model_type="gpt_oss")
        assert [list(kept) for kept in plan.layers] == [sorted(first) for first in firsts]
        plan = plan_from_ranking(ranking, experts, model_type="gpt_oss", order="ranking")
        assert [list(kept) for kept in plan.layers] == firsts
        assert expert_mapping(plan) == mapping_of(raw, experts)


def shipped(name: str) -> list[list[int]]:
    rows: list[list[int]] = json.loads((DATA / "rankings.json").read_text())[name]
    return rows


def test_the_shipped_data_are_eight_orders_of_32_experts_in_24_layers() -> None:
    published = json.loads((DATA / "rankings.json").read_text())
    assert sorted(published) == sorted(DOMAINS) == sorted(RANKINGS)
    for rows in published.values():
        assert len(rows) == 24
        assert all(sorted(row) == list(range(32)) for row in rows)
    assert published["unsafety"] == [row[::-1] for row in published["safety"]]
    assert len({json.dumps(rows) for rows in published.values()}) == 8


def test_the_shipped_topics_are_folders_of_the_tree() -> None:
    topics = json.loads((DATA / "topics.json").read_text())
    assert sorted(topics) == sorted(TOPICS)
    folders = [folder for result in topics.values() for folder in result]
    assert len(set(folders)) == len(folders) == 196
    assert all(len(folder.split("/")) == 2 and all(folder.split("/")) for folder in folders)


def own_order(mixed: list[int], other: list[int]) -> list[int] | None:
    """An order that results in `mixed` when interleaved with `other` position by position; None if none does.

    Step i takes the own order's expert, which is either the next of `mixed` or one that came from
    `other` before, and then other[i], unless taken.
    """

    def steps(i: int, own: tuple[int, ...], used: int) -> tuple[int, ...] | None:
        if i == len(other):
            return own if used == len(mixed) else None
        spare = [e for e in mixed[:used] if e not in own]
        for expert in [*mixed[used : used + 1], *spare[:1]]:
            end = max(used, mixed.index(expert) + 1)
            if other[i] not in mixed[:end]:
                if mixed[end] != other[i]:
                    continue
                end += 1
            if result := steps(i + 1, (*own, expert), end):
                return result
        return None

    result = steps(0, (), 0)
    return None if result is None else list(result)


@pytest.mark.parametrize("topic", TOPICS)
def test_a_shipped_topic_interleaves_an_order_with_all_position_by_position(topic: str) -> None:
    everything, mixed = shipped("all"), shipped(topic)
    own = [own_order(row, other) for row, other in zip(mixed, everything, strict=True)]
    assert None not in own
    result = interleave(
        Ranking(32, tuple(tuple(row) for row in own if row)), Ranking(32, tuple(map(tuple, everything)))
    )
    assert [list(row) for row in result.layers] == mixed


@pytest.mark.parametrize("domain", DOMAINS)
def test_shipped_rankings_give_the_kept_sets_and_mappings_of_all_232_models(domain: str) -> None:
    ranking = load_ranking(f"published:{domain}")
    assert (ranking.num_experts, len(ranking.layers)) == (32, 24)
    assert (ranking.model_type, ranking.provenance) == ("gpt_oss", {"ranking": f"published:{domain}"})
    check(ranking, {f"layer_{i}": row for i, row in enumerate(shipped(domain))}, range(4, 33))


def test_an_unknown_published_ranking_is_refused_with_the_known_names() -> None:
    for name in ("published:maths", "published:", "published:law.json"):
        with pytest.raises(UsageError) as caught:
            load_ranking(Path(name))
        assert str(caught.value) == f"{name}: unknown published ranking; known: {', '.join(DOMAINS)}"


def test_the_data_names_its_source_and_licence() -> None:
    text = (DATA / "README.md").read_text()
    assert "ExpertFingerprinting" in text
    assert "Apache License" in text


def test_a_ranking_in_the_published_format_gives_its_kept_sets_and_mappings(tmp_path: Path) -> None:
    path = tmp_path / "made_up.json"
    path.write_text(json.dumps(MADE_UP))
    check(load_ranking(path), MADE_UP, range(1, 7))


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
