"""What the sections of a card say."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest

from moe_surgery import plan_from_ranking, plan_keeping, plan_random, prune
from moe_surgery.card.method import METHODS
from moe_surgery.selection.metrics import METRICS
from moe_surgery.selection.plan import Plan, load_plan
from moe_surgery.selection.ranking import Ranking
from tests.card.cards import (
    SECTIONS,
    SHAPE,
    blocks,
    cells,
    cut,
    headings,
    load_plan_of,
    readme,
    section,
    spans,
)
from tests.support.checkpoints import Shape, write_checkpoint


def test_sections_are_there_in_order(out: Path) -> None:
    assert headings(readme(out)) == ["some-model with 3 of 8 experts", *SECTIONS]
    assert {"LICENSE", "apache-2.0", "README.source.md"} <= spans(readme(out))


def test_kept_experts_are_listed_by_layer(out: Path) -> None:
    plan = load_plan_of(out)
    rows = cells(section(readme(out), "Kept experts"))
    output = {layer: experts[0] for layer, experts in rows.items() if layer.isdigit()}
    for layer, kept in enumerate(plan.layers):
        numbers: list[int] = []
        for part in output[str(layer)].split(", "):
            first, _, last = part.partition("-")
            numbers += range(int(first), int(last or first) + 1)
        assert tuple(numbers) == kept


def test_long_plan_is_left_to_the_manifest(tmp_path: Path) -> None:
    shape = Shape(
        layers=5, experts=1024, top_k=1, hidden=32, intermediate=32, heads=1, kv_heads=1, head_dim=2
    )
    source = write_checkpoint(tmp_path / "in", shape)
    prune(source, tmp_path / "out", lambda m: plan_random(1000, 1, m))
    assert "<details>" not in readme(tmp_path / "out")
    assert len(readme(tmp_path / "out")) < 8000


RANKED = {"method": "reap", "domains": ["law"], "tokens": 4096, "checkpoint": "0" * 32}
TEXTS = {"law": [{"name": "l.txt", "xxh3_128": "1" * 32, "tokens": 4096}]}


@pytest.mark.parametrize(
    ("provenance", "words"),
    [
        ({"ranking": "law.json"}, ["in the ranking file `law.json`", "is not recorded"]),
        ({**RANKED, "texts": TEXTS}, ["highest `reap`", "| `law` | 1 | 4,096 | `l.txt` |"]),
        (
            {**RANKED, "protect_super_experts": True},
            ["outlier activations", "Domains: `law`", "Tokens: 4,096"],
        ),
        ({"method": "frequency", "statistics": ["a/b/c.json"] * 5}, ["5 files of published", "and 2 more"]),
        (
            {"method": "frequency", "statistics": ["a"], "interleaved_with": {"ranking": "all.json"}},
            ["(`all.json`)"],
        ),
        ({"method": "new way", "beam": 4}, ["recorded in the plan: `new way`", "`beam`: `4`"]),
        ({"method": None}, ["is not recorded in the plan"]),
        ({"method": 7, "texts": {"a": 3, "b": [4, {"tokens": "x"}]}, "domains": 4, "tokens": True}, ["`7`"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_choice_is_reported_in_words(provenance: dict[str, object], words: list[str], tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", SHAPE)
    ranking = Ranking(8, (tuple(range(8)),) * 3, provenance=provenance)
    prune(
        source,
        tmp_path / "out",
        lambda m: plan_from_ranking(ranking, 3, model_type="gpt_oss", order="ranking"),
    )
    output = section(readme(tmp_path / "out"), "How the experts were chosen")
    assert [word for word in words if word not in output] == []
    assert "best first" in output


@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_random_choice_is_reported_and_remade_by_the_commands(
    top_k: int | None, source: Path, tmp_path: Path
) -> None:
    from moe_surgery.cli import main

    out = tmp_path / "out"
    prune(source, out, cut, top_k=top_k)
    card = readme(out)
    assert "chosen at random (seed `5`)" in card
    commands = [line for block in blocks(card, "sh") for line in block.splitlines()]
    (plan,) = [line.split() for line in commands if line.startswith("moe-surgery plan ")]
    made = tmp_path / "made.json"
    arguments = [{"path/to/the/source": str(source), "plan.json": str(made)}.get(a, a) for a in plan[1:]]
    with pytest.raises(SystemExit):
        main(arguments)
    assert load_plan(made) == load_plan_of(out)


def test_plan_without_provenance_says_so(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", SHAPE)
    prune(source, tmp_path / "out", Plan("gpt_oss", 8, ((0, 1), (2, 3), (4, 5))))
    assert "is not recorded in the plan" in readme(tmp_path / "out")


def test_every_metric_has_words() -> None:
    assert set(METHODS) == set(METRICS)


def test_python_of_the_card_runs_as_it_stands(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    out = tmp_path / "out"
    prune("example:tiny", out, lambda m: plan_keeping(list(range(8)), m), store="bf16")
    (program,) = blocks(readme(out), "python")
    assert "path/to/this/folder" in program
    result = io.StringIO()
    with contextlib.redirect_stdout(result):
        exec(program.replace("path/to/this/folder", str(out)), {})
    assert result.getvalue().strip()
