"""The card is true to the checkpoint, and the same whenever it is made."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from moe_surgery import make_card, plan_keeping, prune
from moe_surgery.errors import OutputError, PlanMismatchError, VerificationError
from moe_surgery.quality.accuracy import Accuracy
from tests.card.cards import (
    README,
    SHAPE,
    blocks,
    cells,
    counted,
    cut,
    evaluation_of,
    keep_all,
    load_plan_of,
    metadata,
    quality,
    readme,
    section,
)
from tests.support.checkpoints import Shape, write_checkpoint


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("mxfp4", "keep"), ("mxfp4", "bf16"), ("bf16", "mxfp4"), ("original", "keep"), ("resaved", "keep")],
)
def test_numbers_are_those_of_the_files(layout: str, dtype: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", SHAPE, layout, shards=3)
    full, out = tmp_path / "full", tmp_path / "out"
    prune(source, full, keep_all, card=False)
    result = prune(source, out, cut, store=dtype)
    rows = cells(readme(out))
    total, active = counted(out, 3, 2)
    source_total, source_active = counted(full, 8, 2)
    assert rows["parameters"] == [f"{total:,}", f"{source_total:,}"]
    assert rows["active parameters"] == [f"{active:,}", f"{source_active:,}"]
    assert rows["experts per layer"] == ["3", "8"]
    assert rows["experts per token (top-k)"] == ["2", "2"]
    assert rows["layers"] == ["3", "3"]
    sizes = [sum(f.stat().st_size for f in folder.glob("*.safetensors")) for folder in (out, source)]
    assert rows["weight files"] == [f"{size / 1000:.2f} kB" for size in sizes]
    stored = {"mxfp4": "MXFP4 (4.25 bits per weight)", "bf16": "BF16"}
    before = "mxfp4" if layout in ("mxfp4", "original") else "bf16"
    assert rows["expert weights"] == [stored[result.program.expert_format.name], stored[before]]
    assert rows["other weights"] == ["BF16", "BF16"]
    if result.program.expert_format.name == "mxfp4":
        assert f"which takes {2 * total / 1000:.2f} kB" in readme(out)


def test_top_k_that_changed_is_reported(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", Shape(experts=8, top_k=4))
    prune(source, tmp_path / "out", lambda m: plan_keeping([0, 1, 2], m))
    card = readme(tmp_path / "out")
    assert cells(card)["experts per token (top-k)"] == ["3", "4"]
    assert "top-k 3 is not a power of two" in card
    assert "**Top-k changed.**" in card


@pytest.mark.parametrize("layout", ["mxfp4", "bf16", "original", "resaved"])
@pytest.mark.parametrize("dtype", ["keep", "bf16", "mxfp4"])
def test_card_of_a_finished_checkpoint_is_the_one_it_was_written_with(
    layout: str, dtype: str, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "in", SHAPE, layout, shards=2)
    (source / "README.md").write_bytes(README)
    (source / "USAGE_POLICY").write_text("terms")
    prune(source, tmp_path / "out", cut, store=dtype, max_shard_size=9000)
    assert make_card(tmp_path / "out") == readme(tmp_path / "out")


def test_same_inputs_give_the_same_card_wherever_and_whenever(
    source: Path, out: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    os.utime(source / "README.md", (0, 0))
    prune(source, tmp_path / "elsewhere" / "other name", cut)
    assert readme(tmp_path / "elsewhere" / "other name") == readme(out)
    (tmp_path / "moved").mkdir()
    out.rename(tmp_path / "moved" / "again")
    assert make_card(tmp_path / "moved" / "again") == readme(tmp_path / "moved" / "again")


def test_no_path_of_this_machine_is_reported(out: Path, tmp_path: Path) -> None:
    for name in ("README.md", "surgery.json"):
        assert str(tmp_path) not in (out / name).read_text()
        assert tmp_path.parent.name not in (out / name).read_text()


def test_no_card_leaves_the_sources_readme_as_it_was_called_before(source: Path, tmp_path: Path) -> None:
    prune(source, tmp_path / "bare", cut, card=False)
    assert not (tmp_path / "bare" / "README.md").exists()
    assert (tmp_path / "bare" / "README.source.md").read_bytes() == README
    prune(source, tmp_path / "out", cut)
    assert make_card(tmp_path / "bare") == readme(tmp_path / "out")


def test_source_without_readme_gets_a_card(source: Path, tmp_path: Path) -> None:
    (source / "README.md").unlink()
    prune(source, tmp_path / "out", cut)
    assert not (tmp_path / "out" / "README.source.md").exists()
    assert "The source's model card does not name a licence." in readme(tmp_path / "out")
    assert make_card(tmp_path / "out") == readme(tmp_path / "out")


def test_card_of_a_card_carries_licence_and_citation_on(out: Path, tmp_path: Path) -> None:
    prune(out, tmp_path / "smaller", lambda m: plan_keeping([0, 2], m))
    first, second = readme(out), readme(tmp_path / "smaller")
    assert metadata(second)["license"] == "apache-2.0"
    assert blocks(second, "bibtex") == blocks(first, "bibtex") == ["@misc{model, title={A ``model''}}\n"]


def test_manifest_of_a_version_that_recorded_less_still_gives_a_card(out: Path) -> None:
    from tests.support.manifests import rewrite

    def forget(document: dict[str, dict[str, object]]) -> None:
        document["source"] = {key: document["source"][key] for key in ("layout", "files")}

    rewrite(out, forget)
    card = make_card(out)
    assert cells(card)["experts per token (top-k)"] == ["2", "not recorded"]
    assert cells(card)["expert weights"][1] == "not recorded"
    with pytest.raises(PlanMismatchError, match="does not record which model was pruned"):
        make_card(out, evaluation=evaluation_of("example:tiny", load_plan_of(out), 2))


def test_manifest_with_fields_of_other_types_gives_a_card_all_the_same(out: Path) -> None:
    from tests.support.manifests import rewrite

    junk = {
        "name": 5,
        "top_k": "4",
        "expert_storage": [],
        "base_model": "a: [b",
        "base_model_from": {},
        "revision": 3,
    }
    rewrite(out, lambda d: d["source"].update(junk))
    assert "base_model" not in metadata(make_card(out))


def test_manifest_and_weights_of_two_models_are_refused(out: Path) -> None:
    from tests.support.manifests import rewrite

    rewrite(out, lambda d: d["plan"].update(layers=[[0, 1]] * 3))
    with pytest.raises(VerificationError, match=r"surgery.json: its plan does not match"):
        make_card(out)


def test_checkpoint_without_manifest_has_no_card_to_make(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"surgery.json: not found"):
        make_card(source)
    with pytest.raises(OutputError, match="no such"):
        make_card(tmp_path / "nowhere")


def test_evaluation_is_shown_with_its_figures(source: Path, out: Path) -> None:
    plan = load_plan_of(out)
    card = make_card(out, evaluation=evaluation_of(source, plan, 2))
    rows = cells(section(card, "Evaluation"))
    law, code = quality(1, 3, 300), quality(2, 3)
    redirected = [100 * sum(q.rerouted) / 3 for q in (law, code)]
    assert rows["`law`"] == [
        "300", "2.12", f"{2.718281828459045**law.cross_entropy:.2f}", f"{law.kl:.4f}",
        f"{100 * law.agreement:.1f} %", f"{redirected[0]:.1f} %",
    ]  # fmt: skip
    mean = (300 * law.kl + 100 * code.kl) / 400
    assert (rows["all"][0], rows["all"][3]) == ("400", f"{mean:.4f}")
    assert rows["all"][5] == f"{(300 * redirected[0] + 100 * redirected[1]) / 400:.1f} %"
    assert "Not evaluated" not in card
    assert "Not evaluated" in readme(out)


def test_answers_to_questions_are_shown_beside_the_sources(source: Path, out: Path) -> None:
    evaluation = evaluation_of(source, load_plan_of(out), 2)
    full, actual = evaluation.models
    asked = {"sums": Accuracy(20, 10, ("b", "c", "d"), ("a",)), "words": Accuracy(5, 5)}
    models = (
        replace(full, accuracy={"sums": Accuracy(20, 12), "words": Accuracy(5, 5)}),
        replace(actual, accuracy=asked),
    )
    files = {
        "sums": [{"name": "sums.jsonl", "questions": 20}],
        "words": [{"name": "w.jsonl", "questions": 5}],
    }
    card = make_card(out, evaluation=replace(evaluation, models=models, texts=files, questions=files))
    rows = cells(section(card, "Evaluation"))
    # Wilson's interval of 12 and of 10 of 20, McNemar's test of 3 against 1: 2 * (1 + 4) / 16
    assert rows["`sums`"] == ["20", "60.0 % (38.7 to 78.1)", "50.0 % (29.9 to 70.1)", "3", "1", "0.62"]
    assert rows["`words`"][1:] == ["100.0 % (56.6 to 100.0)"] * 2 + ["0", "0", "1"]
    assert "Compared with the source on questions and its replies to them" in card
    assert "same texts" not in card


def test_evaluation_of_something_else_is_refused(source: Path, out: Path) -> None:
    plan = load_plan_of(out)
    good = evaluation_of(source, plan, 2)
    full, actual = good.models
    wrong = [
        replace(good, identity="0" * 32),
        replace(good, num_experts=16),
        replace(good, models=(full,)),
        replace(good, models=(full, replace(actual, experts=(3, 3, 4)))),
        replace(good, models=(full, replace(actual, top_k=1))),
        replace(good, models=(full, replace(actual, provenance={**plan.provenance, "seed": 6}))),
        replace(good, models=(full, actual, replace(actual, name="b", domains={"law": quality(3, 3)}))),
    ]
    for evaluation in wrong:
        with pytest.raises(PlanMismatchError, match="evaluat"):
            make_card(out, evaluation=evaluation)
    twice = replace(good, models=(full, actual, replace(actual, name="b", kind="checkpoint")))
    assert make_card(out, evaluation=twice) == make_card(out, evaluation=good)
