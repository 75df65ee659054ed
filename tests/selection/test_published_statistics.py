"""The published statistics tree: files read, ranked and refused; rankings interleaved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_surgery.cli import main
from moe_surgery.errors import InvalidInputError, OutputError, PlanMismatchError, UsageError
from moe_surgery.selection.published import interleave, rank_published, statistics_files
from moe_surgery.selection.ranking import Ranking, load_ranking


def write(path: Path, samples: float, think: dict[str, dict[str, float]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {layer: {e: {"count_frequency": f} for e, f in row.items()} for layer, row in think.items()}
    path.write_text(json.dumps({"sample_count": samples, "think_expert_analytics": rows}))
    return path


def test_ties_go_by_first_appearance_and_absent_experts_come_last(tmp_path: Path) -> None:
    write(tmp_path / "a" / "x" / "1.json", 2, {"layer_0": {"3": 0.5, "1": 0.5}})
    write(tmp_path / "a" / "x" / "2.json", 1, {"layer_0": {"2": 1.0}})
    assert rank_published(statistics_files(tmp_path), 5).layers == ((3, 1, 2, 0, 4),)


def test_the_command_ranks_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "t" / "x" / "1.json", 1, {"layer_0": {"1": 0.9, "0": 0.1}, "layer_1": {"0": 1.0}})
    (tmp_path / "all.json").write_text(json.dumps({"layer_0": [0, 1], "layer_1": [1, 0]}))
    out = tmp_path / "ranking.json"
    interleaved = ["--interleave-with", str(tmp_path / "all.json")]
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "rank",
                str(tmp_path / "t"),
                "--num-experts=2",
                "--model-type",
                "gpt_oss",
                "-o",
                str(out),
                *interleaved,
            ]
        )
    assert ended.value.code == 0
    ranking = load_ranking(out)
    assert ranking.layers == ((1, 0), (0, 1))
    assert ranking.model_type == "gpt_oss"
    assert "2 layers of 2 experts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("[]", "expected a JSON object"),
        ('{"sample_count": 1}', "has none"),
        ('{"sample_count": 1, "think_expert_analytics": {"layer_0": {}}}', "name no expert"),
        (
            '{"sample_count": 1e308, "think_expert_analytics": {"layer_0": {"1": {"count_frequency": 1e308}}}}',
            "not a finite number",
        ),
        ('{"sample_count": -1, "think_expert_analytics": {}}', "at least 0"),
        ('{"sample_count": 1, "think_expert_analytics": {"layer": {}}}', "not layer_N"),
        ('{"sample_count": 1, "think_expert_analytics": {"layer_0": {"x": {}}}}', "not an expert number"),
        ('{"sample_count": 1, "think_expert_analytics": {"layer_0": {"1": 3}}}', "expected a JSON object"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, content: str, complaint: str) -> None:
    file = tmp_path / "broken.json"
    file.write_text(content)
    with pytest.raises(InvalidInputError, match=rf"broken\.json.*{complaint}"):
        rank_published([file])


@pytest.mark.parametrize("experts", [0, -1, 100_000_000])
def test_an_absurd_number_of_experts_is_refused(tmp_path: Path, experts: int) -> None:
    file = write(tmp_path / "a" / "b" / "c.json", 1, {"layer_0": {"0": 1.0}})
    with pytest.raises(UsageError, match="choose 1 to 1024"):
        rank_published([file], experts)


def test_an_output_that_is_an_input_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a" / "b" / "c.json", 1, {"layer_0": {"0": 1.0}})
    before = file.read_bytes()
    with pytest.raises(SystemExit) as ended:
        main(["rank", str(tmp_path), "-o", str(file)])
    assert ended.value.code == 2
    assert "is an input" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no statistics"):
        statistics_files(tmp_path)


orders = st.integers(1, 12).flatmap(lambda n: st.lists(st.permutations(range(n)), min_size=2, max_size=6))


@given(orders)
def test_rankings_interleave_position_by_position(rows: list[list[int]]) -> None:
    half = len(rows) // 2
    own, other = rows[:half], rows[half : 2 * half]
    mixed = interleave(
        Ranking(len(rows[0]), tuple(map(tuple, own))), Ranking(len(rows[0]), tuple(map(tuple, other)))
    )
    for row, first, second in zip(mixed.layers, own, other, strict=True):
        expected: list[int] = []
        for i in range(len(first)):
            if first[i] not in expected:
                expected.append(first[i])
            if second[i] not in expected:
                expected.append(second[i])
        assert list(row) == expected


def test_an_expert_taken_before_costs_its_place() -> None:
    own, other = Ranking(5, ((0, 1, 2, 3, 4),)), Ranking(5, ((1, 4, 3, 2, 0),))
    assert interleave(own, other).layers == ((0, 1, 4, 2, 3),)  # taking the next free one: 0, 1, 2, 4, 3


def test_rankings_of_different_shape_do_not_interleave() -> None:
    with pytest.raises(PlanMismatchError, match="interleave"):
        interleave(Ranking(2, ((0, 1),)), Ranking(2, ((0, 1), (1, 0))))
