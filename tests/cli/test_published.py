"""Rankings of others on the command line: the published ones by name and by topic, and layers in lines."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

import moe_surgery
from tests.support.checkpoints import Shape, write_checkpoint
from tests.support.command import call

Capture = pytest.CaptureFixture[str]
DATA = Path(moe_surgery.__file__).parent / "selection" / "data"
RANKINGS: dict[str, list[list[int]]] = json.loads((DATA / "rankings.json").read_text())
TOPICS: dict[str, list[str]] = json.loads((DATA / "topics.json").read_text())
OUTCOMES = ("False_False", "True_False", "False_True", "True_True")  # in the published order
LAYERS, EXPERTS = 2, 10


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All folders of the topics and one more, and so few distinct frequencies that many totals tie."""
    root, rng = tmp_path_factory.mktemp("tree"), random.Random(3)
    for folder in [*(f for results in TOPICS.values() for f in results), "polyglot/Go"]:
        for outcome in rng.sample(OUTCOMES, rng.choice((1, 4, 4))):
            file = root / folder / f"{outcome}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = {
                f"layer_{layer}": {
                    str(e): {"count_frequency": 0.25}
                    for e in rng.sample(range(EXPERTS), EXPERTS if "Go" in folder else 3)
                }
                for layer in range(LAYERS)
            }
            phase = rng.choice(("think_expert_analytics", "answer_expert_analytics"))
            file.write_text(json.dumps({"sample_count": rng.randint(1, 2), phase: rows}))
    return root


def ranked(files: list[Path]) -> list[list[int]]:
    totals: dict[str, dict[int, float]] = defaultdict(dict)
    for file in files:
        result = json.loads(file.read_text())
        for phase in ("think_expert_analytics", "answer_expert_analytics"):
            for layer, row in result.get(phase, {}).items():
                for e, entry in row.items():
                    more = result["sample_count"] * entry["count_frequency"]
                    totals[layer][int(e)] = totals[layer].get(int(e), 0.0) + more
    return [sorted(range(EXPERTS), key=places(totals[f"layer_{layer}"])) for layer in range(LAYERS)]


def places(row: dict[int, float]) -> Callable[[int], tuple[float, int]]:
    """By total, then first appearance; experts that nobody names last, by number."""
    first = list(row)
    return lambda e: (-row[e], first.index(e)) if e in row else (1.0, e)


def interleaved(own: list[int], other: list[int]) -> list[int]:
    taken: list[int] = []
    for i in range(len(own)):
        for e in (own[i], other[i]):
            if e not in taken:
                taken.append(e)
    return taken


def expected(tree: Path, topic: str) -> list[list[int]]:
    everything = ranked(sorted((f for f in tree.rglob("*.json")), key=lambda f: f.parts))
    if topic == "all":
        return everything
    folders = TOPICS["safety" if topic == "unsafety" else topic]
    files = [tree / folder / f"{outcome}.json" for folder in folders for outcome in OUTCOMES]
    own = ranked([f for f in files if f.exists()])
    rows = [interleaved(a, b) for a, b in zip(own, everything, strict=True)]
    return [row[::-1] for row in rows] if topic == "unsafety" else rows


@pytest.mark.parametrize("topic", RANKINGS)
def test_a_tree_is_ranked_for_a_topic_by_its_folders(topic: str, tree: Path, capsys: Capture) -> None:
    ended = call(capsys, "rank", tree, "--topic", topic, "--model-type", "gpt_oss")
    assert ended.code == 0, ended.err
    assert ended.json()["layers"] == expected(tree, topic)
    assert (ended.json()["model_type"], ended.json()["provenance"]["topic"]) == ("gpt_oss", topic)
    files = len(list(tree.rglob("*.json")))
    assert f"the published tree has 703 files, {tree} has {files}" in ended.error


def test_the_made_up_tree_has_ties_that_tell_the_order_of_files(tree: Path) -> None:
    files = {t: [tree / f / f"{o}.json" for f in TOPICS[t] for o in OUTCOMES] for t in TOPICS}
    there = {topic: [f for f in results if f.exists()] for topic, results in files.items()}
    assert any(ranked(results) != ranked(sorted(results)) for results in there.values())


def test_a_tree_without_folders_of_the_topic_is_refused(tree: Path, capsys: Capture) -> None:
    ended = call(capsys, "rank", tree / "mmlu_test", "--topic", "law")
    assert ended.code == 5
    assert "11 of the 11 folders of topic law are missing: mmlu_dev/international_law, " in ended.error
    assert "and 8 more; pass the root of the whole published tree" in ended.error
    assert ended.out == ""


def test_a_folder_without_a_statistics_file_is_missing(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "tulu3_persona_if" / "instruction-following").mkdir(parents=True)
    (tmp_path / "other.json").write_text('{"sample_count": 1, "think_expert_analytics": {"layer_0": {}}}')
    ended = call(capsys, "rank", tmp_path, "--topic", "instruction_following")
    assert (ended.code, ended.out) == (5, "")
    assert "1 of the 1 folders of topic instruction_following are missing: tulu3_persona_if/" in ended.error


def test_what_does_not_go_with_a_topic_is_refused(tree: Path, tmp_path: Path, capsys: Capture) -> None:
    for arguments, output in (
        ([tree, "--topic", "maths"], "'maths' is not one of 'all'"),
        ([tree, tree, "--topic", "law"], "--topic takes one source"),
        ([tree, "--topic", "law", "--interleave-with", "published:all"], "--topic takes one source"),
        ([tree, "--topic", "law", "--metric", "reap"], "published statistics are ranked by frequency only"),
    ):
        ended = call(capsys, "rank", *arguments)
        assert (ended.code, ended.out) == (2, "")
        assert output in ended.error


def test_a_shipped_ranking_is_taken_where_a_ranking_file_is(tmp_path: Path, capsys: Capture) -> None:
    plan = call(capsys, "plan", "published:law", "-n", 8).json()
    assert plan["layers"] == [sorted(row[:8]) for row in RANKINGS["law"]]
    assert (plan["model_type"], plan["provenance"]["ranking"]) == ("gpt_oss", "published:law")

    own = tmp_path / "t" / "x" / "1.json"
    own.parent.mkdir(parents=True)
    rows = {f"layer_{i}": {"31": {"count_frequency": 1}} for i in range(24)}
    own.write_text(json.dumps({"sample_count": 1, "answer_expert_analytics": rows}))
    mixed = call(capsys, "rank", tmp_path / "t", "--interleave-with", "published:all").json()
    first = [31, *range(31)]
    assert mixed["layers"] == [interleaved(first, row) for row in RANKINGS["all"]]

    source = write_checkpoint(tmp_path / "in", Shape(layers=24, experts=32))
    options = ["--experts", 4, "--order", "ranking"]
    assert call(capsys, "prune", source, tmp_path / "out", "--ranking", "published:math", *options).code == 0
    mapping = json.loads((tmp_path / "out" / "expert_mapping.json").read_text())
    assert [list(map(int, mapping[str(i)])) for i in range(24)] == [row[:4] for row in RANKINGS["math"]]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The best 4 experts of every layer in `published:math`, one of the rankings" in card
    assert "not recorded" not in card[card.index("published:math") :].split("##")[0]


@pytest.mark.parametrize(
    "command", [["plan", "published:maths", "-n", "8"], ["prune", "example:tiny", "out"]]
)
def test_an_unknown_published_name_lists_the_eight(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    more = [] if command[0] == "plan" else ["--ranking", "published:maths", "-n", "8"]
    ended = call(capsys, *command, *more)
    assert (ended.code, ended.out) == (2, "")
    assert ended.error.endswith(f"published:maths: unknown published ranking; known: {', '.join(RANKINGS)}")
    assert list(tmp_path.iterdir()) == []
