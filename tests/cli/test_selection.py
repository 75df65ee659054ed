"""From texts to a plan and its price: profile, stats, rank, plan and evaluate as commands."""

from __future__ import annotations

import json
import os
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from moe_surgery import load_plan, load_ranking
from moe_surgery.demo import arithmetic
from moe_surgery.kernels import select_backend
from moe_surgery.pipeline import inspect
from moe_surgery.quality.evaluation import load_evaluation
from moe_surgery.selection.metrics import METRICS
from moe_surgery.selection.statistics import load_statistics, save_statistics
from tests.support.checkpoints import load_tensors, write_checkpoint
from tests.support.command import Ended, call, untouched

Capture = pytest.CaptureFixture[str]
TINY = "example:tiny"
F32 = ("--dtype", "f32")


def done(ended: Ended) -> Ended:
    assert ended.code == 0, ended.err
    return ended


def refused(ended: Ended, code: int) -> str:
    assert (ended.code, ended.out) == (code, ""), ended.err
    assert ended.error.isprintable()
    return ended.error.removeprefix("moe-surgery: ")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of two domains, and their statistics: sums.stats, talk.stats and both.stats."""
    folder = tmp_path_factory.mktemp("selection")
    (folder / "sums.txt").write_text(arithmetic(random.Random(5), 300))
    said = [[{"role": "user", "content": f"What is {n} + {n}?"}] for n in range(4)]
    answered = [[*s, {"role": "assistant", "content": f"{2 * n}"}] for n, s in enumerate(said)]
    for name, lines in (("talk", answered), ("asked", said)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in lines))
    import torch

    from moe_surgery.quality.corpus import text_files
    from moe_surgery.quality.job import profile

    sources = {"sums": ["sums.txt"], "talk": ["talk.jsonl"], "both": ["sums.txt", "talk.jsonl"]}
    for name, files in sources.items():
        out = folder / f"{name}.stats"
        profile(TINY, text_files([folder / f for f in files]), out, dtype=torch.float32)
    write_checkpoint(folder / "other")
    (folder / "r.json").write_text(json.dumps({f"layer_{n}": list(range(32)) for n in range(4)}))
    return folder


# --- profile and stats


def test_profile_writes_statistics_and_says_what_they_are(
    place: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "s"
    texts = ["--texts", place / "sums.txt", "--texts", place / "talk.jsonl"]
    shown = done(call(capsys, "profile", TINY, *texts, "-o", out, *F32))
    both = load_statistics(place / "both.stats")
    for domain in ("sums", "talk:answer", "talk:prompt"):
        assert f"{domain}: {both.tokens[domain]:,} tokens" in shown.out
    assert "4 layers of 32 experts; next: moe-surgery plan" in shown.err
    assert out.read_bytes() == (place / "both.stats").read_bytes()
    told = done(call(capsys, "profile", TINY, *texts, "-o", out, *F32, "--json", "-q"))
    assert told.err == ""
    assert told.json() == {
        "output": str(out),
        "checkpoint": both.identity,
        "tokens": both.tokens,
        "resumed_tokens": 0,
        "texts": both.texts,
        "settings": both.settings,
    }


def test_profile_takes_domains_bounds_and_generated_answers(
    place: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "s"
    options = ["--domain", "law", "--max-tokens", "30", "--context", "20", "--batch-tokens", "7"]
    shown = done(call(capsys, "profile", TINY, "--texts", place / "sums.txt", "-o", out, *options))
    assert shown.out.startswith("law: 30 tokens")
    assert "1 texts are longer than 20 tokens and were split" in shown.err
    import torch

    computed_in = str(select_backend(torch.device("cpu")).dtype).removeprefix("torch.")
    assert load_statistics(out).settings["dtype"] == computed_in
    shown = done(call(capsys, "profile", TINY, "--texts", place / "asked.jsonl", "-o", out, "--generate", 2))
    assert "asked:answer: " in shown.out
    assert load_statistics(out).settings["generate"] == 2


def test_merged_halves_are_the_whole_file(place: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "merged"
    files = [place / "sums.stats", place / "talk.stats"]
    shown = done(call(capsys, "stats", "merge", *files, "-o", out))
    assert f"{out}: 2 files merged" in shown.err
    merged, both = load_statistics(out), load_statistics(place / "both.stats")
    assert (merged.tokens, merged.texts, merged.settings) == (both.tokens, both.texts, both.settings)
    for domain in both.domains:
        for one, other in zip(merged.data[domain], both.data[domain], strict=True):
            np.testing.assert_array_equal(one.count, other.count)
            np.testing.assert_allclose(one.weighted_norm, other.weighted_norm, rtol=1e-5)
    told = done(call(capsys, "stats", "merge", *files, "-o", out, "--json", "-q")).json()
    assert told == {"output": str(out), "checkpoint": both.identity, "tokens": both.tokens}


def test_stats_show_says_what_is_in_a_file(place: Path, capsys: Capture) -> None:
    both = load_statistics(place / "both.stats")
    told = done(call(capsys, "stats", "show", place / "both.stats", "--json")).json()
    assert told["tokens"] == both.tokens
    assert (told["layers"], told["experts"], told["top_k"]) == (4, 32, 4)
    assert told["texts"]["sums"][0]["name"] == "sums.txt"
    shown = done(call(capsys, "stats", "show", place / "both.stats")).out
    assert both.identity in shown
    [row] = [line.split() for line in shown.splitlines() if line.split()[:1] == ["sums"]]
    gates = [np.sort(layer.gate)[::-1] for layer in both.data["sums"]]
    eight = [gate[:8].sum() / gate.sum() for gate in gates]
    assert row[1:3] == [str(both.tokens["sums"]), "1"]
    assert row[5:7] == [f"{np.mean(eight):.0%}", f"({min(eight):.0%})"]


# --- rank


def score(metric: str, file: Path, domains: list[str], layer: int) -> list[float]:
    """From the file's arrays, as the table of metrics has it."""
    from safetensors.numpy import load_file

    arrays = load_file(file)

    def total(name: str) -> np.ndarray:
        return sum(arrays[f"layer.{layer}.{domain}.{name}"] for domain in domains)  # type: ignore[return-value]

    count = total("count")
    chosen = np.maximum(count, 1)
    found: np.ndarray = {
        "frequency": lambda: count,
        "gate": lambda: total("gate"),
        "ean_sum": lambda: total("norm"),
        "ean_mean": lambda: total("norm") / chosen,
        "weighted_ean": lambda: total("weighted_norm"),
        "reap": lambda: total("weighted_norm") / chosen,
        "ean_ca": lambda: np.sqrt(((total("output") / chosen[:, None]) ** 2).sum(axis=1)),
    }[metric]()
    return [float(x) for x in found]


@pytest.mark.parametrize("metric", METRICS)
def test_rank_orders_by_any_metric_over_the_domains_named(
    metric: str, place: Path, tmp_path: Path, capsys: Capture
) -> None:
    out, file = tmp_path / "r.json", place / "both.stats"
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
            held = ranking.scores[layer]
            assert list(row) == sorted(range(32), key=lambda e: (-held[e], e))
        assert ranking.provenance["method"] == metric
        assert ranking.provenance["domains"] == sorted(domains)


def test_rank_adds_sources_up_and_interleaves(place: Path, tmp_path: Path, capsys: Capture) -> None:
    parts = [place / "sums.stats", place / "talk.stats"]
    added = done(call(capsys, "rank", *parts, "--metric", "frequency")).json()
    whole = done(call(capsys, "rank", place / "both.stats", "--metric", "frequency", "--json")).json()
    assert added["layers"] == whole["layers"]
    mixed = done(
        call(capsys, "rank", place / "both.stats", "--metric", "reap", "--interleave-with", place / "r.json")
    ).json()
    own = done(call(capsys, "rank", place / "both.stats", "--metric", "reap")).json()
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
    outlier: int, place: Path, tmp_path: Path, capsys: Capture
) -> None:
    file, found = tmp_path / "s", load_statistics(place / "both.stats")
    least = int(found.over()[outlier].weighted_norm.argmin())
    peak = found.data["sums"][outlier].peak.copy()
    peak[least] = 1e4
    found.data["sums"][outlier].peak = peak
    save_statistics(found, file)
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


# --- rank of the published tree


def made_up_tree(folder: Path) -> Path:
    """Three datasets in the published form, with ties, absent phases and experts nobody names."""
    rng = random.Random(11)
    for dataset in ("a set", "b", "b-2"):
        for category in ("law", "Zoology"):
            for outcome in ("True_True", "False_False"):
                file = folder / dataset / category / f"{outcome}.json"
                file.parent.mkdir(parents=True, exist_ok=True)
                said: dict[str, object] = {"sample_count": rng.randint(1, 9)}
                for phase in rng.choice((["think"], ["answer"], ["think", "answer"])):
                    rows = {}
                    for layer in range(3):
                        experts = rng.sample(range(9), 6)
                        rows[f"layer_{layer}"] = {
                            str(e): {"count_frequency": rng.choice((0.125, 0.25, 0.5))} for e in experts
                        }
                    said[f"{phase}_expert_analytics"] = rows
                file.write_text(json.dumps(said))
    return folder


def by_hand(files: list[Path], experts: int) -> list[list[int]]:
    """The published formula: summed in order, ranked by repeatedly taking the first of the largest."""
    totals: dict[int, dict[int, float]] = defaultdict(dict)
    for file in files:
        said = json.loads(file.read_text())
        for phase in ("think_expert_analytics", "answer_expert_analytics"):
            for layer, row in (said.get(phase) or {}).items():
                held = totals[int(layer[6:])]
                for expert, entry in row.items():
                    more = said["sample_count"] * entry.get("count_frequency", 0)
                    held[int(expert)] = held.get(int(expert), 0) + more
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
        found = [Path(at) / name for at, _, names in os.walk(folder) for name in names]
        return sorted((f for f in found if f.suffix == ".json"), key=lambda f: f.parts)

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


# --- plan


def test_a_plan_straight_from_statistics_is_that_of_their_ranking(
    place: Path, tmp_path: Path, capsys: Capture
) -> None:
    options = ["--metric", "reap", "--domain", "talk", "--protect-super-experts"]
    done(call(capsys, "rank", place / "both.stats", *options, "-o", tmp_path / "r.json"))
    by_ranking = done(call(capsys, "plan", tmp_path / "r.json", "-n", 6)).json()
    straight = done(call(capsys, "plan", place / "both.stats", *options, "-n", 6, TINY)).json()
    assert straight == by_ranking
    told = straight["provenance"]
    assert (told["method"], told["domains"]) == ("reap", ["talk:answer", "talk:prompt"])
    assert told["checkpoint"] == load_statistics(place / "both.stats").identity
    assert told["protect_super_experts"] is True
    assert told["texts"]["talk:answer"][0]["xxh3_128"]


@pytest.mark.parametrize("over", ["worst", "mean"])
@pytest.mark.parametrize("wanted", [0.5, 0.95, 1.0])
def test_coverage_keeps_the_fewest_experts_that_carry_it(
    wanted: float, over: str, place: Path, capsys: Capture
) -> None:
    options = ["--metric", "frequency", "--domain", "sums", "--coverage", wanted, "--coverage-over", over]
    plan = done(call(capsys, "plan", place / "both.stats", *options)).json()
    file = place / "both.stats"
    gates = [np.array(score("gate", file, ["sums"], n)) for n in range(4)]
    ranked = [np.argsort(-np.array(score("frequency", file, ["sums"], n)), kind="stable") for n in range(4)]
    count = len(plan["layers"][0])

    def carried(n: int) -> float:
        shares = [g[r[:n]].sum() / g.sum() for g, r in zip(gates, ranked, strict=True)]
        return float(np.mean(shares) if over == "mean" else min(shares))

    assert carried(count) >= wanted - 1e-12
    assert carried(count - 1) < wanted - 1e-12
    assert {len(row) for row in plan["layers"]} == {count}
    assert plan["provenance"]["coverage"] == wanted
    assert plan["provenance"]["coverage_over"] == over


@pytest.mark.parametrize("storage", ["keep", "mxfp4", "bf16"])
def test_a_target_size_keeps_the_most_experts_that_fit_it(
    storage: str, place: Path, tmp_path: Path, capsys: Capture
) -> None:
    options = ["--metric", "gate", "--target-size", "4MB", "--store", storage, TINY]
    out = tmp_path / "plan.json"
    done(call(capsys, "plan", place / "both.stats", *options, "-o", out))
    plan = load_plan(out)
    count = plan.uniform_experts
    assert count is not None

    def size(n: int) -> int:
        kept = f"0-{n - 1}"
        folder = tmp_path / f"pruned-{n}"
        done(call(capsys, "prune", TINY, folder, "--keep", kept, "--store", storage))
        return sum(t.nbytes for t in load_tensors(folder).values())

    assert size(count) <= 4_000_000 < size(count + 1)
    assert plan.provenance["target_size"] == 4_000_000


def test_target_params_keep_the_most_experts_that_fit(place: Path, capsys: Capture) -> None:
    sizes = {size.experts: size.parameters for size in inspect(TINY).sizes}
    options = ["--metric", "gate", TINY, "--target-params"]
    for target, expected in ((sizes[7], 7), (sizes[7] - 1, 6), (sizes[32] * 5, 32)):
        plan = done(call(capsys, "plan", place / "both.stats", *options, target)).json()
        assert {len(row) for row in plan["layers"]} == {expected}
        assert plan["provenance"]["target_params"] == target
    random_plan = done(call(capsys, "plan", "--random", *options[2:], sizes[3])).json()
    assert {len(row) for row in random_plan["layers"]} == {3}


# --- evaluate


def test_evaluate_shows_and_writes_what_plans_and_checkpoints_cost(
    place: Path, tmp_path: Path, capsys: Capture
) -> None:
    plans = []
    for count in (4, 16):
        plans.append(tmp_path / f"{count}.json")
        options = ["--metric", "reap", "-n", count, "-o", plans[-1]]
        done(call(capsys, "plan", place / "both.stats", *options))
    pruned, out = tmp_path / "pruned", tmp_path / "e.json"
    done(call(capsys, "prune", TINY, pruned, "--plan", plans[0]))
    arguments = ["evaluate", TINY, pruned, "--plan", plans[0], "--plan", plans[1], *F32]
    arguments += ["--texts", place / "sums.txt", "--texts", place / "talk.jsonl", "-o", out]
    shown = done(call(capsys, *arguments))
    found = load_evaluation(out)
    assert [m.name for m in found.models] == ["full", *map(str, plans), str(pruned)]
    assert [m.kind for m in found.models] == ["full", "plan", "plan", "checkpoint"]
    _, four, sixteen, same = found.models
    assert (same.domains, same.provenance) == (four.domains, four.provenance)
    assert four.overall.kl > sixteen.overall.kl > 0
    assert four.provenance["method"] == "reap"
    for title in ("sums", "talk", "all domains"):
        assert title in shown.out.splitlines()
    cells = [line.split() for line in shown.out.splitlines() if line.split()[:1] == [str(plans[0])]]
    assert [row[1] for row in cells] == ["4"] * 3
    assert [row[5] for row in cells] == [
        f"{q.kl:.4f}" for q in (four.domains["sums"], four.domains["talk"], four.overall)
    ]
    told = done(call(capsys, *arguments, "--json", "-q"))
    assert told.err == ""
    assert told.json() == json.loads(out.read_text()) == json.loads(found.to_json())


def test_evaluate_on_answers_only(place: Path, tmp_path: Path, capsys: Capture) -> None:
    done(call(capsys, "plan", place / "both.stats", "--metric", "reap", "-n", 8, "-o", tmp_path / "p.json"))
    arguments = ["evaluate", TINY, "--plan", tmp_path / "p.json", "--texts", place / "talk.jsonl", "--json"]
    few = done(call(capsys, *arguments, "--answers-only")).json()
    every = done(call(capsys, *arguments)).json()
    answers = load_statistics(place / "talk.stats").tokens["talk:answer"]
    assert few["models"][1]["overall"]["tokens"] == answers < every["models"][1]["overall"]["tokens"]


# --- what is refused


CASES: dict[str, tuple[str, int, str]] = {
    "profile: an empty text": (
        "profile example:tiny --texts {new}/empty.txt -o {new}/s",
        3,
        "empty.txt: holds no",
    ),
    "profile: no such text": (
        "profile example:tiny --texts {new}/no.txt -o {new}/s",
        5,
        "no.txt: cannot open",
    ),
    "profile: names for fewer texts": (
        "profile example:tiny --texts {in}/sums.txt --texts {in}/talk.jsonl --texts {in}/asked.jsonl "
        "--domain a --domain b -o {new}/s",
        2,
        "--domain: 2 names for 3 --texts",
    ),
    "profile: no texts": ("profile example:tiny -o {new}/s", 2, "Missing option '--texts'"),
    "profile: no output": ("profile example:tiny --texts {in}/sums.txt", 2, "Missing option '-o'"),
    "profile: an output in no folder": (
        "profile example:tiny --texts {in}/sums.txt -o {new}/no/s",
        5,
        "{new}/no/s: no such folder",
    ),
    "profile: an output that is the text": (
        "profile example:tiny --texts {in}/sums.txt -o {in}/sums.txt",
        2,
        "is an input",
    ),
    "profile: a model without a tokenizer": (
        "profile {in}/other --texts {in}/sums.txt -o {new}/s",
        5,
        "tokenizer.json: not found",
    ),
    "profile: answers to texts": (
        "profile example:tiny --texts {in}/sums.txt --generate 3 -o {new}/s",
        3,
        "sums.txt: answers are generated for conversations",
    ),
    "profile: a format there is not": (
        "profile example:tiny --texts {in}/sums.txt --format csv -o {new}/s",
        2,
        "'csv' is not one of",
    ),
    "merge: another checkpoint": (
        "stats merge {in}/sums.stats {new}/foreign.stats -o {new}/s",
        4,
        "different",
    ),
    "merge: the same twice": (
        "stats merge {in}/sums.stats {in}/both.stats -o {new}/s",
        4,
        "sums.txt is in two",
    ),
    "merge: onto an input": ("stats merge {in}/sums.stats -o {in}/sums.stats", 2, "is an input"),
    "merge: a ranking": ("stats merge {in}/r.json -o {new}/s", 3, "{in}/r.json: "),
    "show: no such file": ("stats show {new}/no.stats", 5, "no.stats: cannot open"),
    "show: a checkpoint": (
        "stats show {in}/other/model.safetensors",
        3,
        "is a safetensors file of weights, not a statistics file",
    ),
    "rank: no metric": ("rank {in}/both.stats", 2, "choose how to rank: --metric frequency|gate|"),
    "rank: an unknown metric": (
        "rank {in}/both.stats --metric best",
        2,
        "--metric best: unknown; known: freq",
    ),
    "rank: an unknown domain": (
        "rank {in}/both.stats --metric reap --domain cooking",
        3,
        "domain 'cooking' is not in these statistics; there are: sums, talk:answer, talk:prompt",
    ),
    "rank: a missing source": ("rank {new}/no.stats --metric reap", 5, "no.stats: cannot open: no such file"),
    "rank: another kind of source": (
        "rank {in}/both.stats {in}/r.json --metric reap",
        3,
        "{in}/r.json: is a ranking, not a statistics file",
    ),
    "rank: two checkpoints": (
        "rank {in}/sums.stats {new}/foreign.stats --metric reap",
        4,
        "different checkpoints",
    ),
    "rank: a ranking as the source": ("rank {in}/r.json", 3, "{in}/r.json: "),
    "rank: a metric for a ranking": ("rank {in}/r.json --metric reap", 3, "is a ranking, not"),
    "rank: experts of ours": ("rank {in}/both.stats --metric reap --num-experts 32", 2, "have both"),
    "plan: another checkpoint's statistics": (
        "plan {in}/both.stats --metric reap -n 2 {in}/other",
        4,
        "the statistics were made from another checkpoint",
    ),
    "plan: no metric": ("plan {in}/both.stats -n 2", 2, "choose how to rank it: --metric frequency|"),
    "plan: an unknown metric": ("plan {in}/both.stats --metric best -n 2", 2, "--metric best: unknown"),
    "plan: an unknown domain": (
        "plan {in}/both.stats --metric reap --domain x -n 2",
        3,
        "domain 'x' is not in",
    ),
    "plan: a metric for a ranking": ("plan {in}/r.json --metric reap -n 2", 2, "{in}/r.json: is a ranking"),
    "plan: missing statistics": ("plan {new}/no.stats --metric reap -n 2", 5, "no.stats: cannot open"),
    "plan: coverage of a ranking": (
        "plan {in}/r.json --coverage 0.9 --model-type gpt_oss",
        2,
        "--coverage needs STATS",
    ),
    "plan: two amounts": (
        "plan {in}/both.stats --metric reap -n 2 --coverage 0.5",
        2,
        "exactly one of --experts",
    ),
    "plan: no amount": ("plan {in}/both.stats --metric reap", 2, "exactly one of --experts, --coverage"),
    "plan: a share of percent": (
        "plan {in}/both.stats --metric reap --coverage 95",
        2,
        "--coverage 95: must be",
    ),
    "plan: no share": ("plan {in}/both.stats --metric reap --coverage 0", 2, "--coverage 0: must be"),
    "plan: a target too small": (
        "plan {in}/both.stats --metric reap --target-size 1kB example:tiny",
        2,
        "even with one expert a layer it has",
    ),
    "plan: too few weights": (
        "plan {in}/both.stats --metric reap --target-params 1k example:tiny",
        2,
        "even with one expert a layer it has",
    ),
    "plan: a target for no model": (
        "plan {in}/both.stats --metric reap --target-size 2MB",
        2,
        "--target-size needs CKPT",
    ),
    "plan: no size": (
        "plan {in}/both.stats --metric reap --target-size big example:tiny",
        2,
        "'big' is not a size",
    ),
    "plan: no count": (
        "plan {in}/both.stats --metric reap --target-params 6.6X example:tiny",
        2,
        "'6.6X' is not a number",
    ),
    "plan: too many experts": (
        "plan {in}/both.stats --metric reap -n 33",
        2,
        "--experts 33: the model has 32",
    ),
    "plan: another model type": (
        "plan {in}/both.stats --metric reap -n 3 --model-type other",
        4,
        "the ranking is for gpt_oss, not for other",
    ),
    "plan: a domain for drawn experts": (
        "plan --random -n 3 --domain x example:tiny",
        2,
        "need STATS",
    ),
    "plan: a way to hold nothing": (
        "plan {in}/both.stats --metric reap -n 3 --coverage-over mean",
        2,
        "--coverage-over needs --coverage",
    ),
    "plan: storage for nothing": (
        "plan {in}/both.stats --metric reap -n 3 --store bf16",
        2,
        "--store needs --target-size",
    ),
    "evaluate: nothing to hold against": (
        "evaluate example:tiny --texts {in}/sums.txt",
        2,
        "nothing to compare",
    ),
    "evaluate: an empty text": (
        "evaluate example:tiny --plan {new}/p.json --texts {new}/empty.txt",
        3,
        "holds no",
    ),
    "evaluate: another model's plan": (
        "evaluate example:tiny --plan {new}/foreign.json --texts {in}/sums.txt",
        4,
        "the plan is for gpt_oss with 2 layers of 4 experts",
    ),
    "evaluate: another model": (
        "evaluate example:tiny {in}/other --texts {in}/sums.txt",
        4,
        "{in}/other: has 2 layers",
    ),
    "evaluate: no answers": (
        "evaluate example:tiny --plan {new}/p.json --texts {in}/sums.txt --answers-only",
        2,
        "no token to predict in an answer",
    ),
    "evaluate: nothing to predict": (
        "evaluate example:tiny --plan {new}/p.json --texts {in}/sums.txt --max-tokens 1",
        2,
        "no token to predict",
    ),
    "evaluate: no batches": (
        "evaluate example:tiny --plan {new}/p.json --texts {in}/sums.txt --batch-tokens 0",
        2,
        "--batch-tokens 0: must be at least 1",
    ),
    "evaluate: onto a plan": (
        "evaluate example:tiny --plan {new}/p.json --texts {in}/sums.txt -o {new}/p.json",
        2,
        "is an input",
    ),
    "evaluate: a ranking as a plan": (
        "evaluate example:tiny --plan {in}/r.json --texts {in}/sums.txt",
        3,
        "is a ranking, not a plan",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_error_is_one_line_with_its_exit_code_and_nothing_is_written(
    case: str, place: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "empty.txt").write_text("")
    foreign = load_statistics(place / "talk.stats")
    foreign.identity = "0" * 32
    save_statistics(foreign, tmp_path / "foreign.stats")
    plan = {"format": "moe-surgery.plan", "version": 1, "model_type": "gpt_oss", "num_source_experts": 32}
    plan |= {"num_layers": 4, "layers": [[0, 1]] * 4}
    (tmp_path / "p.json").write_text(json.dumps(plan))
    plan |= {"num_source_experts": 4, "num_layers": 2, "layers": [[0, 1]] * 2}
    (tmp_path / "foreign.json").write_text(json.dumps(plan))
    arguments, code, told = CASES[case]
    paths = {"in": place, "new": tmp_path}
    with untouched(place, tmp_path):
        line = refused(call(capsys, *(a.format(**paths) for a in arguments.split())), code)
    assert told.format(**paths) in line
