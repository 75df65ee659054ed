"""The index of a sweep: all variants, with the figures of their evaluations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_surgery import plan_from_ranking, sweep
from moe_surgery.errors import (
    PlanMismatchError,
)
from moe_surgery.families.identity import identity
from moe_surgery.quality.evaluation import Evaluation, ModelResult, Quality
from tests.support.sweeps import COUNTS, NAMES, RANKINGS


def evaluation(model: str, source: Path, kls: dict[tuple[int, int], float]) -> Evaluation:
    """By seed of the ranking and number of experts."""
    from moe_surgery import Checkpoint, identify_model

    with Checkpoint.open(source) as opened:
        digest = identity(opened, identify_model(opened))
    full = ModelResult("full", "full", (8,) * 3, 2, {"law": Quality(10, 1.0, 0.0, 1.0, (0.0,) * 3)})
    models = [
        ModelResult(
            f"{model}/whatever-{n}", "checkpoint", (n,) * 3, min(2, n),
            {"law": Quality(10, 1.0 + kl, kl, 0.5, (0.1,) * 3)},
            dict(plan_from_ranking(RANKINGS[seed][1], n).provenance),
        )
        for (seed, n), kl in kls.items()
    ]  # fmt: skip
    return Evaluation("gpt_oss", model, digest, 8, (full, *models))


def test_the_index_lists_all_variants_with_their_figures(source: Path, copied: Path, tmp_path: Path) -> None:
    (copied / "some.json").write_text(evaluation("x", source, {(0, 2): 0.25, (1, 5): 0.125}).to_json())
    given = tmp_path / "given.json"
    given.write_text(evaluation("x", source, {(1, 5): 0.5}).to_json())
    result = sweep(source, copied, RANKINGS, COUNTS, evaluations=[given])
    kls = {e.name: e.figures["law"]["kl"] for e in result.entries if e.figures}
    assert kls == {"law-2": 0.25, "math-5": 0.5}
    index = json.loads((copied / "index.json").read_text())
    assert {v["name"]: v["figures"]["law"]["kl"] for v in index["variants"] if v["figures"]} == kls
    for v in index["variants"]:
        assert v["nbytes"] == sum(f.stat().st_size for f in (copied / v["name"]).iterdir())
    rows = [line.split(" | ") for line in (copied / "index.md").read_text().splitlines() if "| [" in line]
    assert {r[0].removeprefix("| ").split("]")[0][1:]: r[9] for r in rows} == {
        name: {"law-2": "0.2500", "math-5": "0.5000"}.get(name, "\N{EN DASH}") for name in NAMES
    }
    page = (copied / "index.html").read_text()
    assert all(f'href="{name}/"' in page for name in NAMES)
    assert "http:" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in page
    # A later sweep without the evaluation files keeps the figures.
    (copied / "some.json").unlink()
    assert sweep(source, copied, RANKINGS, COUNTS).entries == result.entries


def test_an_evaluation_of_another_model_is_refused_where_it_is_named(source: Path, copied: Path) -> None:
    other = evaluation("x", source, {})
    text = other.to_json().replace(other.identity, "0" * 32)
    (copied / "other.json").write_text(text)
    sweep(source, copied, RANKINGS, COUNTS)
    with pytest.raises(PlanMismatchError, match=r"other\.json: is an evaluation of 'x'"):
        sweep(source, copied, RANKINGS, COUNTS, evaluations=[copied / "other.json"])
