"""The package's own names, and paths in place of plans, rankings, statistics and evaluations."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moe_surgery
from moe_surgery import Progress, export_gguf, load_plan, make_card, plan_from_ranking, prune, rank
from moe_surgery.checkpoint.resolve import resolve
from moe_surgery.errors import MoeSurgeryError, OutputError, PlanMismatchError, UsageError
from moe_surgery.pipeline.planning import check_statistics
from moe_surgery.quality.evaluation import load_evaluation
from moe_surgery.report.page import build_report
from moe_surgery.report.png import write_pictures
from moe_surgery.selection.plan import Plan
from moe_surgery.selection.published import interleave
from moe_surgery.selection.ranking import Ranking
from moe_surgery.selection.statistics import merge, save_statistics
from tests.card.cards import evaluation_of
from tests.report.inputs import made_up
from tests.support.checkpoints import assert_same_tensors, kept_tensors, load_config, load_tensors

TINY = "example:tiny"
PLAN = Plan("gpt_oss", 32, tuple(tuple(range(i, 32, 4)) for i in range(4)))
RANKING = Ranking(32, tuple(tuple((7 * e + i) % 32 for e in range(32)) for i in range(4)), "gpt_oss")
AS = pytest.mark.parametrize("as_path", [str, Path], ids=["str", "Path"])
AsPath = Callable[[Path], str | Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """plan.json, ranking.json, a.stats and b.stats (of no real checkpoint), evaluation.json (of the tiny one)."""
    target = tmp_path_factory.mktemp("files")
    (target / "plan.json").write_text(PLAN.to_json())
    (target / "ranking.json").write_text(RANKING.to_json())
    for name, seed in (("a", 0), ("b", 1)):
        save_statistics(made_up(4, 32, [name], seed), target / f"{name}.stats")
    (target / "evaluation.json").write_text(evaluation_of(TINY, PLAN, 4).to_json())
    return target


# --- names


def test_the_public_names_are_there_and_listed() -> None:
    assert {n for n in dir(moe_surgery) if not n.startswith("__")} == set(moe_surgery.__all__) - {
        "__version__"
    }
    for name in moe_surgery.__all__:
        assert getattr(moe_surgery, name) is not None
    with pytest.raises(AttributeError, match="'moe_surgery' has no attribute 'nothing'"):
        moe_surgery.nothing  # noqa: B018


def test_dir_shows_the_names_before_any_is_used_and_imports_nothing() -> None:
    code = "import json, sys, moe_surgery as m; print(json.dumps([dir(m), m.__all__, sorted(sys.modules)]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    listed, public, modules = json.loads(done.stdout)
    expected = {
        "load_model",
        "generate",
        "stream",
        "speculate",
        "view",
        "profile",
        "evaluate",
        "rank",
        "prune",
    }
    assert expected <= set(public) <= set(listed)
    assert listed == sorted(listed)
    assert not {"torch", "numpy", "moe_surgery.pipeline"} & set(modules)


# --- paths


@AS
def test_a_model_is_loaded_with_the_plan_in_a_file(folder: Path, tmp_path: Path, as_path: AsPath) -> None:
    """As the checkpoint pruned by hand of its tensors computes."""
    torch = pytest.importorskip("torch")
    from moe_surgery import load_model, view
    from tests.support.checkpoints import write_folder

    source = resolve(TINY)
    config = load_config(source)
    config["num_local_experts"] = 8
    pruned = write_folder(tmp_path / "pruned", kept_tensors(load_tensors(source), PLAN.layers), config)
    tokens = torch.arange(40)[None] % 250

    expected = load_model(pruned)(tokens)
    plan = as_path(folder / "plan.json")
    assert torch.equal(load_model(TINY, plan=plan)(tokens), expected)
    assert torch.equal(view(load_model(TINY), plan)(tokens), expected)


@AS
def test_prune_and_export_take_the_path_of_a_plan(folder: Path, tmp_path: Path, as_path: AsPath) -> None:
    plan = as_path(folder / "plan.json")
    result = prune(TINY, tmp_path / "out", plan)
    assert result.program.plan == PLAN
    assert_same_tensors(
        load_tensors(tmp_path / "out"), kept_tensors(load_tensors(resolve(TINY)), PLAN.layers)
    )
    export_gguf(TINY, tmp_path / "by-path.gguf", plan=plan)
    export_gguf(TINY, tmp_path / "by-plan.gguf", plan=PLAN)
    assert (tmp_path / "by-path.gguf").read_bytes() == (tmp_path / "by-plan.gguf").read_bytes()


@AS
def test_rankings_and_statistics_are_taken_by_path(folder: Path, as_path: AsPath) -> None:
    ranking, a, b = (as_path(folder / name) for name in ("ranking.json", "a.stats", "b.stats"))
    kept = plan_from_ranking(ranking, 8).layers
    assert kept == tuple(tuple(sorted(row[:8])) for row in RANKING.layers)
    backward = Ranking(32, tuple(row[::-1] for row in RANKING.layers))
    assert interleave(backward, ranking).layers == interleave(backward, RANKING).layers
    assert interleave(ranking, backward).layers == interleave(RANKING, backward).layers
    first = made_up(4, 32, ["a"], 0)
    assert rank(a, "frequency").layers == tuple(
        tuple(sorted(range(32), key=lambda e: (-int(layer.count[e]), e))) for layer in first.data["a"]
    )
    both = merge([a, b])
    assert (both.domains, both.tokens["b"]) == (["a", "b"], made_up(4, 32, ["b"], 1).tokens["b"])
    with pytest.raises(PlanMismatchError, match="were made from another checkpoint"):
        check_statistics(TINY, a)


def test_a_published_ranking_is_named_where_a_ranking_goes() -> None:
    plan = plan_from_ranking("published:law", 8)
    assert (plan.model_type, plan.num_layers, plan.uniform_experts) == ("gpt_oss", 24, 8)


@AS
def test_reports_and_cards_take_paths(folder: Path, tmp_path: Path, as_path: AsPath) -> None:
    plan, evaluation, a = (as_path(folder / name) for name in ("plan.json", "evaluation.json", "a.stats"))
    statistics = made_up(4, 32, ["a"], 0)
    named = [(str(plan), PLAN)]
    assert build_report(a, [plan]) == build_report(statistics, named)
    assert build_report(a, [("p", plan)]) == build_report(statistics, [("p", PLAN)])
    prune(TINY, tmp_path / "out", PLAN)
    actual = evaluation_of(TINY, PLAN, 4)
    assert make_card(tmp_path / "out", evaluation=evaluation) == make_card(
        tmp_path / "out", evaluation=actual
    )
    assert load_evaluation(evaluation) == actual


def test_pictures_take_paths(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    next(write_pictures(tmp_path / "paths", folder / "a.stats", [folder / "plan.json"]))
    next(write_pictures(tmp_path / "objects", made_up(4, 32, ["a"], 0), [(str(folder / "plan.json"), PLAN)]))
    names = [f.name for f in (tmp_path / "paths").iterdir()]
    assert names == [f.name for f in (tmp_path / "objects").iterdir()] != []
    for name in names:
        assert (tmp_path / "paths" / name).read_bytes() == (tmp_path / "objects" / name).read_bytes()


@AS
def test_profile_and_evaluate_take_the_path_of_a_plan(folder: Path, tmp_path: Path, as_path: AsPath) -> None:
    np = pytest.importorskip("numpy")
    pytest.importorskip("torch")
    pytest.importorskip("tokenizers")
    from moe_surgery import evaluate, profile

    notes, plan = tmp_path / "notes.txt", as_path(folder / "plan.json")
    notes.write_text("Twelve plus seven is nineteen. " * 4)
    by_path = profile(TINY, notes, tmp_path / "a", sequential=plan).statistics
    by_plan = profile(TINY, [notes], tmp_path / "b", sequential=PLAN).statistics
    assert by_path.settings == by_plan.settings
    assert all(
        np.array_equal(x.gate, y.gate)
        for x, y in zip(by_path.data["notes"], by_plan.data["notes"], strict=True)
    )
    actual = evaluate(TINY, as_path(notes), plans=[plan, ("mine", plan), ("object", PLAN)])
    assert [m.name for m in actual.models] == ["full", str(plan), "mine", "object"]
    assert actual.models[1].domains == actual.models[2].domains == actual.models[3].domains


# --- texts


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """law.txt, and chats.txt with rows of JSON under the name of a text."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "law.txt").write_text("The parties agree. " * 3)
    (folder / "chats.jsonl").write_text('{"text": "Twelve plus seven is nineteen."}\n' * 2)
    return folder


def test_profile_search_and_evaluate_take_the_same_texts(sentences: Path, tmp_path: Path) -> None:
    """Every form of the same texts gives the same files: a path, several, or the paths of each domain."""
    pytest.importorskip("torch")
    pytest.importorskip("tokenizers")
    from moe_surgery import TextFile, evaluate, profile, search

    law, chats = sentences / "law.txt", sentences / "chats.jsonl"
    forms: dict[str, list[Any]] = {
        "one": [law, str(law), [law], {"law": law}, {"law": [str(law)]}, TextFile(law, "law", "text")],
        "two": [
            [law, chats],
            (p for p in (str(law), str(chats))),
            {"law": [law], "chats": chats},
            [TextFile(law, "law", "text"), chats],
        ],
    }
    options: dict[str, Any] = {"context": 6, "max_tokens": 9}
    for name, texts in forms.items():
        results = []
        for number, given in enumerate(texts):
            listed = list(given) if not isinstance(given, (str, Path, dict, TextFile)) else given
            out = tmp_path / f"{name}-{number}"
            actual = profile(TINY, listed, out.with_suffix(".stats"), **options)
            ranking = search(TINY, listed, out.with_suffix(".json"), **options)
            evaluation = evaluate(TINY, listed, plans=[("p", PLAN)], **options)
            results.append(
                (actual.statistics.texts, actual.output.read_bytes(), ranking, evaluation.to_json())
            )
        assert all(result == results[0] for result in results), name
        assert list(results[0][0]) == (["law"] if name == "one" else ["law", "chats"])


def test_format_and_bounds_mean_the_same_to_all_three(sentences: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("tokenizers")
    from moe_surgery import evaluate, profile, search

    calls: list[Callable[..., object]] = [
        lambda **o: profile(TINY, sentences / "law.txt", tmp_path / "s", **o),
        lambda **o: search(TINY, sentences / "law.txt", tmp_path / "r", **o),
        lambda **o: evaluate(TINY, sentences / "law.txt", plans=[("p", PLAN)], **o),
    ]
    for run in calls:
        for options, named in (
            ({"context": 0}, "`context` 0: this model supports 1 to 4096 tokens"),
            ({"max_tokens": 0}, "`max_tokens` 0: must be at least 1"),
            ({"format": "jsonl"}, "not a row of JSON|law.txt: line 1"),
        ):
            with pytest.raises(MoeSurgeryError, match=named):
                run(**options)
        with pytest.raises(TypeError, match="format"):
            run(text_format="jsonl")
    with pytest.raises(UsageError, match="no texts"):
        evaluate(TINY, {}, plans=[("p", PLAN)])
    wrong: Any = 7
    with pytest.raises(TypeError):
        evaluate(TINY, wrong, plans=[("p", PLAN)])
    assert list(tmp_path.iterdir()) == []


# --- progress


def test_every_long_job_reports_progress_in_one_shape(sentences: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("tokenizers")
    from moe_surgery import evaluate, profile, search, trace, verify

    law = sentences / "law.txt"
    jobs: dict[tuple[str, str], Callable[[Any], object]] = {
        ("prune", "bytes"): lambda p: prune(TINY, tmp_path / "out", PLAN, progress=p),
        ("verify", "bytes"): lambda p: verify(tmp_path / "out", source=TINY, progress=p),
        ("export", "bytes"): lambda p: export_gguf(TINY, tmp_path / "out.gguf", progress=p),
        ("profile", "tokens"): lambda p: profile(TINY, law, tmp_path / "s", progress=p),
        ("search", "tokens"): lambda p: search(TINY, law, tmp_path / "r", progress=p),
        ("evaluate", "tokens"): lambda p: evaluate(TINY, law, plans=[("p", PLAN)], progress=p),
        ("trace", "tokens x layers"): lambda p: trace(TINY, "a", plans=[("p", PLAN)], progress=p),
    }
    for (stage, unit), job in jobs.items():
        reports: list[Progress] = []
        job(reports.append)
        assert {(r.stage, r.unit, r.total) for r in reports} == {(stage, unit, reports[0].total)}
        done = [r.done for r in reports]
        assert done == sorted(done)
        assert done[0] == 0 < done[-1]
        if stage != "verify":  # whose total is that of files, some read twice
            assert done[-1] == reports[-1].total


# --- neither


def test_what_is_neither_an_object_nor_a_path_is_refused(folder: Path, tmp_path: Path) -> None:
    loose: Any = load_plan(folder / "plan.json").as_dict()
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: prune(TINY, tmp_path / "out", loose), "expected Plan or the path of its file, not dict"),
        (lambda: export_gguf(TINY, tmp_path / "o.gguf", plan=loose), "expected Plan .* not dict"),
        (lambda: plan_from_ranking(loose, 8), "expected Ranking or the path of its file, not dict"),
        (lambda: plan_from_ranking(PLAN, 8), "expected Ranking or the path of its file, not Plan"),  # type: ignore[arg-type]
        (lambda: rank(loose, "reap"), "expected Statistics or the path of its file, not dict"),
        (
            lambda: make_card(tmp_path, evaluation=loose),
            "expected Evaluation or the path of its file, not dict",
        ),
    ]
    for call, printed in wrong:
        with pytest.raises(TypeError, match=printed):
            call()
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone.json"
    for call in (
        lambda: prune(TINY, tmp_path / "out", gone),
        lambda: export_gguf(TINY, tmp_path / "out.gguf", plan=gone),
        lambda: plan_from_ranking(gone, 8),
        lambda: rank(gone, "reap"),
        lambda: build_report(gone),
    ):
        with pytest.raises(OutputError, match=r"gone\.json: cannot open"):
            call()
    assert list(tmp_path.iterdir()) == []
