"""rank as a command."""

from __future__ import annotations

import json
import os
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from moe_surgery import load_ranking
from moe_surgery.selection.metrics import PROFILED_METRICS
from moe_surgery.selection.statistics import load_statistics, save_statistics
from tests.cli.scores import score
from tests.support.command import call, done, refused

Capture = pytest.CaptureFixture[str]
TINY = "example:tiny"
F32 = ("--dtype", "f32")


@pytest.mark.parametrize("metric", PROFILED_METRICS)
def test_rank_orders_by_any_metric_over_the_domains_named(
    metric: str, inputs: Path, tmp_path: Path, capsys: Capture
) -> None:
    out, file = tmp_path / "r.json", inputs / "both.stats"
    for options, domains in (
        ([], ["sums", "talk:answer", "talk:prompt"]),
        (["--domain", "talk"], ["talk:answer", "talk:prompt"]),
        (["--domain", "sums", "--domain", "talk:answer"], ["sums", "talk:answer"]),
    ):
        done(call(capsys, "rank", file, "--metric", metric, "-o", out, *options))
        ranking = load_ranking(out)
        assert ranking.scores is not None
        for layer, row in enumerate(ranking.layers):
            scores = score(metric, file, domains, layer)
            assert ranking.scores[layer] == pytest.approx(scores, rel=1e-12)
            stored = ranking.scores[layer]
            assert list(row) == sorted(range(32), key=lambda e: (-stored[e], e))
        assert ranking.provenance["method"] == metric
        assert ranking.provenance["domains"] == sorted(domains)


def test_rank_adds_sources_up_and_interleaves(inputs: Path, tmp_path: Path, capsys: Capture) -> None:
    parts = [inputs / "sums.stats", inputs / "talk.stats"]
    added = done(call(capsys, "rank", *parts, "--metric", "frequency")).json()
    whole = done(call(capsys, "rank", inputs / "both.stats", "--metric", "frequency", "--json")).json()
    assert added["layers"] == whole["layers"]
    mixed = done(
        call(
            capsys, "rank", inputs / "both.stats", "--metric", "reap", "--interleave-with", inputs / "r.json"
        )
    ).json()
    own = done(call(capsys, "rank", inputs / "both.stats", "--metric", "reap")).json()
    for row, first in zip(mixed["layers"], own["layers"], strict=True):
        assert row == interleaved(first, list(range(32)))


def interleaved(first: list[int], second: list[int]) -> list[int]:
    """Position by position, the one's expert and then the other's, unless already taken."""
    taken: list[int] = []
    for i in range(len(first)):
        if first[i] not in taken:
            taken.append(first[i])
        if second[i] not in taken:
            taken.append(second[i])
    return taken


@pytest.mark.parametrize("outlier", [1, 3])
def test_super_experts_come_first_when_they_are_protected(
    outlier: int, inputs: Path, tmp_path: Path, capsys: Capture
) -> None:
    file, results = tmp_path / "s", load_statistics(inputs / "both.stats")
    least = int(results.over()[outlier].weighted_norm.argmin())
    peak = results.data["sums"][outlier].peak.copy()
    peak[least] = 1e4
    results.data["sums"][outlier].peak = peak
    save_statistics(results, file)
    plain = done(call(capsys, "rank", file, "--metric", "reap")).json()
    kept = done(call(capsys, "rank", file, "--metric", "reap", "--protect-super-experts")).json()
    both = load_statistics(file).over()
    peaks = np.array([layer.peak for layer in both])
    threshold = max(np.quantile(peaks, 0.995), peaks.max() / 10)
    for number, (row, before) in enumerate(zip(kept["layers"], plain["layers"], strict=True)):
        guarded = [e for e in before if number < 3 and peaks[number][e] > threshold]
        assert row == guarded + [e for e in before if e not in guarded]
    first = kept["layers"][outlier][0]
    assert (first == least) == (outlier < 3)  # in the last quarter of the layers none is protected


def made_up_tree(folder: Path) -> Path:
    """Three datasets in the published form, with ties, absent phases and experts nobody names."""
    rng = random.Random(11)
    for dataset in ("a set", "b", "b-2"):
        for category in ("law", "Zoology"):
            for outcome in ("True_True", "False_False"):
                file = folder / dataset / category / f"{outcome}.json"
                file.parent.mkdir(parents=True, exist_ok=True)
                result: dict[str, object] = {"sample_count": rng.randint(1, 9)}
                for phase in rng.choice((["think"], ["answer"], ["think", "answer"])):
                    rows = {}
                    for layer in range(3):
                        experts = rng.sample(range(9), 6)
                        rows[f"layer_{layer}"] = {
                            str(e): {"count_frequency": rng.choice((0.125, 0.25, 0.5))} for e in experts
                        }
                    result[f"{phase}_expert_analytics"] = rows
                file.write_text(json.dumps(result))
    return folder


def by_hand(files: list[Path], experts: int) -> list[list[int]]:
    """The published formula: summed in order, ranked by repeatedly taking the first of the largest."""
    totals: dict[int, dict[int, float]] = defaultdict(dict)
    for file in files:
        result = json.loads(file.read_text())
        for phase in ("think_expert_analytics", "answer_expert_analytics"):
            for layer, row in (result.get(phase) or {}).items():
                stored = totals[int(layer[6:])]
                for expert, entry in row.items():
                    more = result["sample_count"] * entry.get("count_frequency", 0)
                    stored[int(expert)] = stored.get(int(expert), 0) + more
    ranked = []
    for layer in sorted(totals):
        left, row = dict(totals[layer]), []
        while left:
            row.append(max(left, key=left.__getitem__))  # max keeps the first of equals
            del left[row[-1]]
        ranked.append(row + [e for e in range(experts) if e not in row])
    return ranked


def test_rank_of_a_published_tree_is_the_formula_whole_by_dataset_and_interleaved(
    tmp_path: Path, capsys: Capture
) -> None:
    tree, experts = made_up_tree(tmp_path / "tree"), 10
    options = ["--num-experts", experts, "--model-type", "gpt_oss"]

    def files(folder: Path) -> list[Path]:
        results = [Path(at) / name for at, _, names in os.walk(folder) for name in names]
        return sorted((f for f in results if f.suffix == ".json"), key=lambda f: f.parts)

    done(call(capsys, "rank", tree, "-o", tmp_path / "all.json", *options))
    everything = json.loads((tmp_path / "all.json").read_text())["layers"]
    assert everything == by_hand(files(tree), experts)
    for dataset in sorted(p for p in tree.iterdir() if p.is_dir()):
        own = done(call(capsys, "rank", dataset, *options)).json()
        assert own["layers"] == by_hand(files(dataset), experts)
        assert own["model_type"] == "gpt_oss"
        mixed = done(
            call(capsys, "rank", dataset, *options, "--interleave-with", tmp_path / "all.json")
        ).json()
        for row, first, second in zip(mixed["layers"], own["layers"], everything, strict=True):
            assert row == interleaved(first, second)
    several = sorted(p for p in tree.iterdir() if p.is_dir())[:2]
    joint = done(call(capsys, "rank", *several, *options)).json()
    assert joint["layers"] == by_hand([f for folder in several for f in files(folder)], experts)


def test_an_unreadable_activations_file_is_named(tmp_path: Path, capsys: Capture) -> None:
    tree = made_up_tree(tmp_path / "tree")
    broken = tree / "b" / "law" / "True_True.json"
    for content in (
        b"",
        b"{",
        b"\xff\xfe",
        b'{"sample_count": 1, "think_expert_analytics": {"layer_x": {}}}',
    ):
        broken.write_bytes(content)
        assert refused(call(capsys, "rank", tree), 3).startswith(f"{broken}: ")
    broken.unlink()
    broken.symlink_to(tmp_path / "gone")
    done(call(capsys, "rank", tree))
