"""The demo does the main job and what it shows makes sense."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("tokenizers")

from moe_surgery import inspect
from moe_surgery.demo import JOBS, SOURCE, DemoRow, arithmetic, demo_texts, run_demo
from moe_surgery.errors import OutputError
from tests.support.command import call


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[DemoRow], list[str], Path]:
    recorded: list[str] = []
    out = tmp_path_factory.mktemp("demo") / "models"
    return run_demo(out, recorded.append), recorded, out


Shown = tuple[list[DemoRow], list[str], Path]


def test_there_is_a_row_for_the_full_model_and_one_for_each_job(shown: Shown) -> None:
    rows, recorded, out = shown
    assert [(row.name, row.experts) for row in rows] == [
        ("full", 32),
        ("tiny-16-mxfp4", 16),
        ("tiny-8-mxfp4", 8),
        ("tiny-4-mxfp4", 4),
        ("tiny-8-bf16", 8),
        ("tiny-8-random", 8),
    ]
    assert all(row.verified for row in rows)
    assert len(recorded) == 3 + 3 * len(JOBS)
    for row in rows:
        results = inspect(SOURCE if row.name == "full" else out / row.name)
        assert (row.experts, row.top_k) == (results.experts, results.top_k)
        assert (row.parameters, row.nbytes) == (results.parameters, results.nbytes)


def test_every_model_generates_and_has_a_finite_loss_on_every_text(shown: Shown) -> None:
    rows, _, _ = shown
    for row in rows:
        assert set(row.losses) == set(demo_texts())
        assert all(math.isfinite(loss) and loss > 0 for loss in row.losses.values())
        assert row.tokens_per_second
        assert row.sample is not None


def test_the_full_model_knows_arithmetic_best(shown: Shown) -> None:
    full, *pruned = (row.losses["arithmetic"] for row in shown[0])
    assert full < min(pruned)
    assert full < math.log(2048) / 2  # far from guessing


def test_chosen_experts_keep_more_than_random_ones_of_the_texts_they_were_chosen_for(shown: Shown) -> None:
    losses = {row.name: row.losses for row in shown[0]}
    assert losses["tiny-16-mxfp4"]["code"] < losses["tiny-8-random"]["code"]
    assert losses["tiny-8-mxfp4"]["arithmetic"] < losses["tiny-8-random"]["arithmetic"] / 2


def test_expert_dtype_hardly_changes_the_loss(shown: Shown) -> None:
    losses = {row.name: row.losses for row in shown[0]}
    assert losses["tiny-8-bf16"] == pytest.approx(losses["tiny-8-mxfp4"], rel=0.01)


def test_the_sums_of_the_text_are_right() -> None:
    import random

    text = arithmetic(random.Random(1), 2000)
    assert len(text) >= 2000
    for question, answer in zip(*[iter(text.splitlines())] * 2, strict=True):
        sum_, result = answer.removeprefix("Answer: ").removesuffix(".").split(" = ")
        assert question == f"Question: What is {sum_}?"
        assert eval(sum_) == int(result)


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot create: File exists"):
        run_demo(tmp_path, lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_the_rows_as_json(
    capsys: pytest.CaptureFixture[str], shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_surgery.demo.JOBS", JOBS[2:3])
    ended = call(capsys, "demo", "--json")
    assert ended.code == 0
    full, pruned = ended.json()
    by_name = {row.name: row for row in shown[0]}
    for row in (full, pruned):
        assert row["losses"] == pytest.approx(by_name[row["name"]].losses, rel=0.01)


def test_the_command_shows_a_table_and_samples(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_surgery.demo.JOBS", JOBS[2:3])
    ended = call(capsys, "demo", "-q")
    assert (ended.code, ended.err) == (0, "")
    assert "arithmetic" in ended.out
    assert ended.out.count("tiny-4-mxfp4") == 2  # its row and its sample
