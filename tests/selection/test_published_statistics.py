"""The published statistics tree against a brute-force ranking."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

from moe_surgery.cli import main
from moe_surgery.errors import InvalidInputError, OutputError, PlanMismatchError, UsageError
from moe_surgery.selection.published import interleave, rank_published, statistics_files
from moe_surgery.selection.ranking import Ranking, load_ranking

TREE = Path(__file__).parents[3] / "shared" / "data" / "activations"
RANKINGS = TREE.parent / "rankings"
needs_tree = pytest.mark.skipif(not TREE.is_dir(), reason="the published statistics are not at hand")


def brute_force(files: list[Path], experts: int = 32) -> list[list[int]]:
    """Straight from the formula, with lists and a stable sort."""
    totals: dict[int, dict[int, float]] = defaultdict(dict)
    for file in files:
        said = json.loads(file.read_text())
        for phase in ("think_expert_analytics", "answer_expert_analytics"):
            for layer, row in (said.get(phase) or {}).items():
                for expert, entry in row.items():
                    held = totals[int(layer.removeprefix("layer_"))]
                    amount = said["sample_count"] * entry.get("count_frequency", 0)
                    held[int(expert)] = held.get(int(expert), 0) + amount
    ranked = []
    for layer in range(len(totals)):
        pairs = list(totals[layer].items())
        for i in range(1, len(pairs)):  # insertion sort: equal totals keep their order
            j = i
            while j and pairs[j][1] > pairs[j - 1][1]:
                pairs[j - 1], pairs[j] = pairs[j], pairs[j - 1]
                j -= 1
        named = [e for e, _ in pairs]
        ranked.append(named + [e for e in range(experts) if e not in named])
    return ranked


@needs_tree
def test_the_sample_ranks_as_by_brute_force_whole_and_per_dataset() -> None:
    folders = [TREE, *sorted(p for p in TREE.iterdir() if p.is_dir())]
    assert len(folders) > 2
    for folder in folders:
        files = statistics_files(folder)
        assert [list(row) for row in rank_published(files, 32).layers] == brute_force(files)


@needs_tree
def test_a_topic_is_interleaved_with_all_topic_first() -> None:
    own = rank_published(statistics_files(TREE / "mmlu_test" / "professional_law"), 32)
    everything = load_ranking(RANKINGS / "all.json")
    mixed = interleave(own, everything)
    for row, first, second in zip(mixed.layers, own.layers, everything.layers, strict=True):
        expected: list[int] = []
        queues = [list(first), list(second)]
        while len(expected) < 32:
            for queue in queues:
                while queue and queue[0] in expected:
                    queue.pop(0)
                if queue:
                    expected.append(queue.pop(0))
        assert list(row) == expected
        assert row[0] == first[0]


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
        main(["rank", str(tmp_path / "t"), "-n2", "--model-type", "gpt_oss", "-o", str(out), *interleaved])
    assert ended.value.code == 0
    ranking = load_ranking(out)
    assert ranking.layers == ((1, 0), (0, 1))
    assert ranking.model_type == "gpt_oss"
    assert "2 layers of 2 experts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("[]", "expected a JSON object"),
        ('{"sample_count": 1}', "has neither"),
        ('{"sample_count": 1, "think_expert_analytics": {"layer_0": {}}}', "name no expert"),
        (
            '{"sample_count": 1e308, "think_expert_analytics": {"layer_0": {"1": {"count_frequency": 1e308}}}}',
            "no finite number",
        ),
        ('{"sample_count": -1, "think_expert_analytics": {}}', "at least 0"),
        ('{"sample_count": 1, "think_expert_analytics": {"layer": {}}}', "no layer_N"),
        ('{"sample_count": 1, "think_expert_analytics": {"layer_0": {"x": {}}}}', "no expert number"),
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
    assert "is the input" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no statistics"):
        statistics_files(tmp_path)


def test_rankings_of_different_shape_do_not_interleave() -> None:
    with pytest.raises(PlanMismatchError, match="interleave"):
        interleave(Ranking(2, ((0, 1),)), Ranking(2, ((0, 1), (1, 0))))
