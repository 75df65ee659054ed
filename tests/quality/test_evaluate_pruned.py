"""Pruned checkpoints are evaluated like plans of the same experts, from wherever their files come."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from moe_surgery import prune  # noqa: E402
from moe_surgery.checkpoint.resolve import resolve  # noqa: E402
from moe_surgery.errors import InvalidInputError  # noqa: E402
from moe_surgery.quality.evaluate import evaluate  # noqa: E402
from moe_surgery.runtime.text import Text  # noqa: E402
from moe_surgery.selection.plan import Plan  # noqa: E402
from tests.quality.plans import F32, PLANS, TINY  # noqa: E402
from tests.support.sources import MemoryFolder  # noqa: E402


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "eight"
    prune(TINY, out, PLANS["eight"])
    return out


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_a_view_has_exactly_the_figures_of_the_pruned_checkpoint(
    dtype: torch.dtype, pruned: Path, tmp_path: Path, text: Text, paths: list[Path]
) -> None:
    prune(TINY, tmp_path / "two", PLANS["top-2 of eight"])
    prune(TINY, tmp_path / "bf16", PLANS["eight"], store="bf16")
    evaluation = evaluate(
        TINY,
        paths,
        plans=[("a", PLANS["eight"]), ("b", PLANS["top-2 of eight"])],
        pruned=[pruned, tmp_path / "two", tmp_path / "bf16"],
        dtype=dtype,
    )
    _, view, view2, same, same2, converted = evaluation.models
    assert same.kind == "checkpoint"
    assert same.name == str(pruned)
    for one, other in ((view, same), (view2, same2)):
        assert (one.domains, one.experts, one.top_k) == (other.domains, other.experts, other.top_k)
    for domain, quality in view.domains.items():
        # The weights are equal, the order of additions in a product is not.
        got = converted.domains[domain]
        assert got.cross_entropy == pytest.approx(quality.cross_entropy, rel=1e-5 if dtype == F32 else 0.02)
        assert got.rerouted == pytest.approx(quality.rerouted, abs=1e-12 if dtype == F32 else 0.02)


def published(folder: Path, plan: Plan) -> Path:
    """As the published models are: experts in rank order, a mapping, no manifest of ours."""
    prune(TINY, folder, plan)
    (folder / "surgery.json").unlink()
    return folder


def test_a_published_checkpoint_is_understood_by_its_mapping(tmp_path: Path, text: Text, texts: Path) -> None:
    plan = PLANS["eight"]
    assert any(list(row) != sorted(row) for row in plan.layers)
    mapped, bare = published(tmp_path / "mapped", plan), published(tmp_path / "bare", plan)
    mapping = json.loads((mapped / "expert_mapping.json").read_text())
    assert mapping == {str(n): {str(e): i for i, e in enumerate(row)} for n, row in enumerate(plan.layers)}
    shuffled = {n: dict(sorted(row.items())) for n, row in mapping.items()}
    (mapped / "expert_mapping.json").write_text(json.dumps(shuffled))
    (bare / "expert_mapping.json").unlink()
    evaluation = evaluate(TINY, texts / "words.jsonl", plans=[("x", plan)], pruned=[mapped, bare], dtype=F32)
    _, view, by_mapping, unknown = (m.domains["words"] for m in evaluation.models)
    assert by_mapping == view
    assert sum(view.rerouted) > 0
    assert unknown == replace(view, rerouted=())
    assert evaluation.models[2].provenance == {}


def test_a_cut_of_a_cut_tells_no_rerouted_routes_of_the_first_source(
    pruned: Path, tmp_path: Path, text: Text, texts: Path
) -> None:
    prune(pruned, tmp_path / "four", Plan("gpt_oss", 8, ((0, 2, 4, 6),) * 4))
    evaluation = evaluate(TINY, texts / "words.jsonl", pruned=[tmp_path / "four"], dtype=F32)
    assert evaluation.models[1].experts == (4,) * 4
    assert evaluation.models[1].domains["words"].rerouted == ()
    assert evaluation.models[1].overall.rerouted == ()
    nearer = evaluate(pruned, texts / "words.jsonl", pruned=[tmp_path / "four"], dtype=F32)
    assert len(nearer.models[1].domains["words"].rerouted) == 4


MAPPINGS: dict[str, object] = {
    "a list": [],
    "a layer too few": {str(n): {str(e): e for e in range(8)} for n in range(3)},
    "a layer as a list": {str(n): list(range(8)) for n in range(4)},
    "names for numbers": {str(n): {f"e{e}": e for e in range(8)} for n in range(4)},
    "places that are no numbers": {str(n): {str(e): [e] for e in range(8)} for n in range(4)},
    "an expert too many": {str(n): {str(e): e for e in range(9)} for n in range(4)},
    "an expert there is not": {str(n): {str(e + 30): e for e in range(8)} for n in range(4)},
    "a negative expert": {str(n): {str(e - 1): e for e in range(8)} for n in range(4)},
    "a place twice": {str(n): {str(e): e // 2 for e in range(8)} for n in range(4)},
    "null": None,
}


@pytest.mark.parametrize("case", MAPPINGS)
def test_a_mapping_that_makes_no_sense_is_named(case: str, pruned: Path, tmp_path: Path, text: Text) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in pruned.iterdir():
        if file.name not in ("surgery.json", "expert_mapping.json"):
            (folder / file.name).symlink_to(file)
    (folder / "expert_mapping.json").write_text(json.dumps(MAPPINGS[case]))
    (tmp_path / "x.txt").write_text("One and two.")
    with pytest.raises(InvalidInputError, match=r"expert_mapping\.json"):
        evaluate(TINY, tmp_path / "x.txt", pruned=[folder])


def test_checkpoints_in_memory_are_evaluated_as_from_their_files(
    pruned: Path, tmp_path: Path, text: Text, texts: Path
) -> None:
    mapped = published(tmp_path / "mapped", PLANS["eight"])
    corpus, folders = texts / "words.jsonl", [pruned, mapped]
    expected = evaluate(TINY, corpus, pruned=folders, dtype=F32)
    source = MemoryFolder(resolve(TINY))
    in_memory = [MemoryFolder(folder) for folder in folders]
    shutil.rmtree(mapped)
    got = evaluate(source, corpus, pruned=in_memory, dtype=F32)
    assert [(m.name, m.domains, m.provenance) for m in got.models] == [
        (m.name, m.domains, m.provenance) for m in expected.models
    ]
    assert all(sum(m.domains["words"].rerouted) > 0 for m in got.models[1:])
    assert [m.opened["expert_mapping.json"] for m in in_memory] == [0, 1]  # a manifest says more


def test_a_mapping_in_memory_that_makes_no_sense_is_named(tmp_path: Path, text: Text, texts: Path) -> None:
    mapped = published(tmp_path / "mapped", PLANS["eight"])
    (mapped / "expert_mapping.json").write_text("{}")
    with pytest.raises(InvalidInputError, match=rf"{mapped}/expert_mapping\.json: expected"):
        evaluate(TINY, texts / "words.jsonl", pruned=[MemoryFolder(mapped)], dtype=F32)
