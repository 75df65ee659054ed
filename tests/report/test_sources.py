"""Pages of published statistics and of rankings: shown with what they have."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moe_surgery.errors import InvalidInputError, PlanMismatchError, UsageError
from moe_surgery.report.page import build_report
from moe_surgery.report.sources import read_subject
from moe_surgery.selection.plan import plan_from_ranking
from moe_surgery.selection.published import rank_published, statistics_files
from moe_surgery.selection.ranking import load_ranking
from moe_surgery.selection.shipped import RANKINGS
from moe_surgery.selection.statistics import save_statistics
from tests.report.inputs import made_up
from tests.report.parsed_page import HOSTILE, Page

# Two layers of three experts: (prob_density, count_frequency) by expert, which files list in any order.
THINK = [{2: (0.6, 1.0), 0: (0.4, 0.9)}, {1: (0.7, 1.0), 2: (0.1, 0.2), 0: (0.2, 0.7)}]
ANSWER = [{0: (0.5, 0.8), 1: (0.5, 0.7)}, {0: (1.0, 1.0)}]


def outcome(samples: int, *, weights: bool = True, tokens: bool = True, answer: bool = True) -> str:
    def phase(layers: list[dict[int, tuple[float, float]]]) -> dict[str, object]:
        return {
            f"layer_{n}": {
                str(e): {"prob_density": w, "count_frequency": f} if weights else {"count_frequency": f}
                for e, (w, f) in row.items()
            }
            for n, row in enumerate(layers)
        }

    root: dict[str, object] = {"sample_count": samples, "think_expert_analytics": phase(THINK)}
    root |= {"num_think_tokens": 100.5} if tokens else {}
    root |= {"answer_expert_analytics": phase(ANSWER), "num_answer_tokens": 10.0} if answer else {}
    return json.dumps(root)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, content in {
        "exam/law/True_True": outcome(4),
        "exam/law/False_False": outcome(2, answer=False),
        "exam/maths and more/True_False": outcome(10, answer=False),
    }.items():
        file = tmp_path / "tree" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return tmp_path / "tree"


def test_published_statistics_are_shown_with_what_they_have(tree: Path) -> None:
    subject = read_subject(tree)
    assert subject.metrics == ("frequency", "gate")
    assert [(v.name, v.tokens) for v in subject.views] == [
        ("all domains", 4 * 110.5 + 2 * 100.5 + 10 * 100.5 // 1),
        ("exam/law", 643),
        ("exam/maths and more", 1005),
    ]
    law = subject.views[1]
    np.testing.assert_allclose(law.scores["frequency"][0], [6 * 0.9 + 4 * 0.8, 4 * 0.7, 6 * 1.0])
    np.testing.assert_allclose(law.scores["gate"][1], [6 * 0.2 + 4 * 1.0, 6 * 0.7, 6 * 0.1])
    np.testing.assert_allclose(law.shares["routes"].sum(axis=1), 1)
    for view, files in ((law, tree / "exam" / "law"), (subject.views[0], tree)):
        ranked = rank_published(statistics_files(files))
        assert view.orders["frequency"].tolist() == [list(row) for row in ranked.layers]

    page = Page(build_report(tree))
    assert (page.data["kinds"], page.data["metrics"]) == (["weight", "routes"], ["frequency", "gate"])
    assert page.packed["peak"] is None
    names = [a["id"] for _, a in page.elements if "id" in a]
    assert "coverage-section" in names
    # Nothing of what is unknown: neither other metrics, nor top-k, nor a checkpoint.
    for word in ("reap", "ean_", "top-", "Checkpoint", "None", "nan"):
        assert word not in page.words


@pytest.mark.parametrize(("weights", "tokens"), [(False, True), (True, False), (False, False)])
def test_weights_and_tokens_may_be_missing(tmp_path: Path, weights: bool, tokens: bool) -> None:
    file = tmp_path / "one.json"
    file.write_text(outcome(3, weights=weights, tokens=tokens))
    subject = read_subject(file)
    [view] = subject.views
    assert subject.metrics == (("frequency", "gate") if weights else ("frequency",))
    assert (view.tokens is None) is (not tokens)
    page = Page(build_report(file))
    assert page.data["kinds"] == (["weight", "routes"] if weights else ["routes"])
    assert ("routing weight" in page.words) is weights
    assert "overlap" not in [a.get("id") for _, a in page.elements]


def test_the_eight_published_rankings_are_one_page() -> None:
    page = Page(build_report([f"published:{name}" for name in RANKINGS]))
    assert [v["name"] for v in page.data["views"]] == list(RANKINGS)
    assert (page.data["kinds"], page.data["measured"], page.packed["scores"]) == ([], False, None)
    names = [a["id"] for _, a in page.elements if "id" in a]
    assert {"overlap", "overlap-layers", "shared", "map-view"} <= set(names)
    assert not {"coverage-section", "map-metric", "map-scale"} & set(names)
    assert "Experts of gpt_oss" in page.words


def test_a_plan_fits_a_ranking_or_published_statistics_of_its_shape(tree: Path) -> None:
    law = load_ranking("published:law")
    plan = plan_from_ranking(law, 8)
    assert Page(build_report("published:law", [("p", plan)])).data["plans"][0]["coverage"] == {}
    with pytest.raises(
        PlanMismatchError, match="24 layers of 32 experts, but the statistics are of gpt_oss with 2 layers"
    ):
        build_report(tree, [("p", plan)])


def test_sources_that_do_not_go_together_are_refused(tree: Path, tmp_path: Path) -> None:
    ours, other = tmp_path / "a.stats", tmp_path / "other.json"
    save_statistics(made_up(2, 4, ["x"]), ours)
    other.write_text(json.dumps({"layer_0": [1, 0]}))
    for sources in ([ours, "published:law"], [tree, "published:law"], [ours, tree]):
        with pytest.raises(UsageError, match="a report shows files of one kind"):
            read_subject(sources)
    with pytest.raises(UsageError, match="shows one statistics file; merge them with `stats merge`"):
        read_subject([ours, ours])
    with pytest.raises(
        PlanMismatchError, match="other: ranks 1 layers of 2 experts of an unknown model, but law 24"
    ):
        read_subject(["published:law", other])
    with pytest.raises(UsageError, match="two rankings have the same name"):
        read_subject(["published:law", "published:law"])
    with pytest.raises(UsageError, match="domain 'poetry' is not among exam/law, exam/maths and more"):
        read_subject(tree, ["poetry"])
    broken = tree / "exam" / "law" / "True_True.json"
    broken.write_text(broken.read_text().replace("0.7", "-1"))
    with pytest.raises(InvalidInputError, match=r"True_True\.json.*expected a number of at least 0"):
        build_report(tree)
    broken.write_text(broken.read_text().replace("layer_1", "layer_9999").replace("-1", "1"))
    with pytest.raises(InvalidInputError, match="name layer 9999 and expert 2; expected at most 1024 layers"):
        build_report(tree)


@pytest.mark.parametrize("name", [n for n in HOSTILE if "/" not in n and "\x00" not in n])
def test_folder_and_file_names_stay_names(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "set" / name
    folder.mkdir(parents=True)
    (folder / "False_False.json").write_text(outcome(1))
    ranking = tmp_path / f"{name}.json"
    ranking.write_text(json.dumps({"layer_0": [1, 0]}))
    for page in (build_report(tmp_path / "set"), build_report(ranking)):
        parsed = Page(page)
        assert [t for t, _ in parsed.elements].count("script") == 3
        assert not [t for t, _ in parsed.elements if t in ("img", "style!")]
        assert not [c for c in page if not c.isprintable() and c != "\n"]
