"""--imatrix of plan and prune, the cut matrix, and stats import."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from moe_surgery.selection.imatrix import load_imatrix
from moe_surgery.selection.imatrix.models import open_weights, rank_imatrix
from moe_surgery.selection.statistics import load_statistics
from tests.support.command import assert_sound, call, done, refused, siblings
from tests.support.imatrices import (
    DOWN,
    GATE,
    Matrix,
    simulate,
    write_gguf_imatrix,
    write_legacy_imatrix,
)
from tests.support.tiny_ggufs import write_tiny_gguf

Capture = pytest.CaptureFixture[str]
FORMS = ["im.gguf", "im.dat"]


@pytest.fixture(scope="module")
def made() -> Matrix:
    """For the embedded model: 4 layers of 32 experts, top-4, hidden 160."""
    with open_weights("example:tiny") as (weights, _):
        norms = {n: weights.norm(n) for n in weights.spec.layer_numbers}
        shape = weights.shape(f"blk.0.{DOWN}")
    assert shape is not None
    return simulate(norms, shape[1], experts=32, top_k=4, tokens=1024)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def files(made: Matrix, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_gguf_imatrix(folder / "im.gguf", made)
    write_legacy_imatrix(folder / "im.dat", made)
    other = {name: type(s)(s.squares * 1.5, s.counts) for name, s in made.items()}
    write_gguf_imatrix(folder / "other.gguf", other)
    return folder


def best(made: Matrix, metric: str, layer: int, count: int) -> list[int]:
    sums = made[f"blk.{layer}.{DOWN}"]
    scores = sums.counts if metric == "frequency" else np.sqrt(sums.squares.sum(axis=1) * sums.counts)
    return sorted(sorted(range(32), key=lambda e: (-scores[e], e))[:count])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("metric", ["frequency", "rms_count"])
def test_a_plan_keeps_the_best_by_the_matrix(
    form: str, metric: str, files: Path, made: Matrix, tmp_path: Path, capsys: Capture
) -> None:
    options = ["--imatrix", files / form, "--experts", "8", "--metric", metric]
    ended = done(call(capsys, "plan", "example:tiny", *options, "-o", tmp_path / "p.json"))
    plan = json.loads((tmp_path / "p.json").read_text())
    assert plan["layers"] == [best(made, metric, layer, 8) for layer in range(4)]
    assert (plan["model_type"], plan["provenance"]["method"]) == ("gpt_oss", metric)
    assert ("counts were solved for" in ended.err) == (form == "im.dat")


def test_the_default_metric_is_said(files: Path, capsys: Capture) -> None:
    ended = done(call(capsys, "plan", "example:tiny", "--imatrix", files / "im.gguf", "-n", "8"))
    assert json.loads(ended.out)["provenance"]["method"] == "rms_count"
    assert "note: experts are ranked by rms_count" in ended.err


def test_prune_needs_one_command(files: Path, made: Matrix, tmp_path: Path, capsys: Capture) -> None:
    options = ["--imatrix", files / "im.gguf", "--experts", "6", "--metric", "rms_count", "--json"]
    cut = tmp_path / "cut.gguf"
    ended = done(call(capsys, "prune", "example:tiny", tmp_path / "out", *options, "--cut-imatrix", cut))
    assert ended.json()["outcome"] is not None
    assert_sound(tmp_path / "out", "example:tiny")
    manifest = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert manifest["plan"]["layers"] == [best(made, "rms_count", layer, 6) for layer in range(4)]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Scores come from importance matrices of llama.cpp: `im.gguf`." in card
    assert "the highest `rms_count`: how often the router chose it, times" in card
    matrix = load_imatrix(cut)
    for layer in range(4):
        entry = matrix.entries[f"blk.{layer}.{GATE}"]
        kept = best(made, "rms_count", layer, 6)
        assert entry.counts is not None
        np.testing.assert_array_equal(entry.counts, made[f"blk.{layer}.{GATE}"].counts[kept])
    # The matrix of the source can be cut for any choice.
    ended = call(
        capsys,
        "prune",
        "example:tiny",
        tmp_path / "first",
        "--keep",
        "0-4",
        *options[:2],
        "--cut-imatrix",
        cut,
    )
    done(ended)
    assert load_imatrix(cut).entries[f"blk.0.{GATE}"].experts == 5
    # A dry run writes nothing.
    dry = ["--dry-run", "--cut-imatrix", tmp_path / "dry.gguf"]
    done(call(capsys, "prune", "example:tiny", tmp_path / "dry", *options, *dry))
    assert not (tmp_path / "dry.gguf").exists()
    assert not (tmp_path / "dry").exists()


def test_a_matrix_of_another_model_is_one_line_and_leaves_nothing(
    files: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    options = ["--imatrix", files / "other.gguf", "--experts", "6"]
    message = refused(call(capsys, "prune", "example:tiny", out, *options), 4)
    assert message.startswith(f"{files / 'other.gguf'}: block 0: inputs divided by the weight of the norm")
    assert "mean square of 1.5, not 1" in message
    assert not out.exists()
    assert siblings(out) == []


@pytest.mark.parametrize("mtp", ["keep", "drop"])
def test_a_gguf_model_is_pruned_by_its_matrix_in_one_command(
    mtp: str, tmp_path: Path, capsys: Capture
) -> None:
    """With a block for multi-token prediction, for which no matrix has data."""
    model, out, cut = (tmp_path / name for name in ("glm.gguf", "out.gguf", "cut.gguf"))
    write_tiny_gguf(model, "glm4moe", types="Q4_K", mtp=1)
    with open_weights(model) as (weights, _):
        norms = {n: weights.norm(n) for n in weights.spec.layer_numbers}
        shape = weights.shape(f"blk.{max(norms)}.{DOWN}")
        numbers = weights.spec.layer_numbers
    assert shape is not None
    matrix = simulate(norms, shape[1], experts=8, top_k=2, tokens=512)  # type: ignore[arg-type]
    write_gguf_imatrix(tmp_path / "im.gguf", matrix)
    options = ["--imatrix", tmp_path / "im.gguf", "--experts", "5", "--mtp", mtp, "--cut-imatrix", cut]
    ended = done(call(capsys, "prune", model, out, *options, "--manifest"))
    assert "experts are ranked by rms_count" in ended.err
    done(call(capsys, "verify", out, "--source", model))
    ranking = rank_imatrix(tmp_path / "im.gguf", model, "rms_count")
    kept = {n: sorted(row[:5]) for n, row in zip(numbers, ranking.layers, strict=True)}
    tensors = {t.name: t for t in gguf.GGUFReader(out).tensors}
    source = {t.name: t for t in gguf.GGUFReader(model).tensors}
    entries = load_imatrix(cut).entries
    for number in numbers:
        name = f"blk.{number}.{DOWN}"
        np.testing.assert_array_equal(tensors[name].data, source[name].data[kept[number]])
        np.testing.assert_array_equal(entries[name].counts, matrix[name].counts[kept[number]])  # type: ignore[arg-type]
        assert entries[name].sums.size == int(np.prod(tensors[name].shape[[0, 2]]))  # as llama-quantize asks
    done(call(capsys, "plan", model, "--imatrix", tmp_path / "im.gguf", "-n", "5", "-o", tmp_path / "p.json"))
    assert json.loads((tmp_path / "p.json").read_text())["layers"] == [kept[n] for n in numbers]


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        (["plan", "example:tiny", "--imatrix", "IM", "--keep", "0-3"], 2, "exactly one of RANKING or STATS, --imatrix"),
        (["plan", "r.json", "example:tiny", "--imatrix", "IM", "-n", "4"], 2, "--imatrix or by a RANKING or STATS"),
        (["plan", "--imatrix", "IM", "-n", "4"], 2, "--imatrix needs CKPT"),
        (["plan", "example:tiny", "--imatrix", "IM"], 2, "exactly one of --experts, --coverage"),
        (["plan", "example:tiny", "--imatrix", "IM", "--coverage", "0.9"], 2, "--coverage needs STATS"),
        (["plan", "example:tiny", "--imatrix", "IM", "-n", "4", "--metric", "reap"], 2, "--metric reap: needs norms"),
        (["plan", "example:tiny", "--imatrix", "IM", "-n", "4", "--metric", "x"], 2, "--metric x: unknown"),
        (["plan", "example:tiny", "--imatrix", "IM", "-n", "4", "--domain", "x"], 2, "--domain and"),
        (["plan", "example:tiny", "-n", "4", "--random", "--allow-missing"], 2, "--allow-missing needs --imatrix"),
        (["prune", "example:tiny", "OUT", "--imatrix", "IM"], 2, "--ranking or --imatrix and --experts need"),
        (["prune", "example:tiny", "OUT", "--imatrix", "IM", "--keep", "0-3"], 2, "exactly one of --plan, --ranking"),
        (["prune", "example:tiny", "OUT", "--keep", "0-3", "--cut-imatrix", "C"], 2, "--cut-imatrix needs --imatrix"),
        (["prune", "example:tiny", "OUT", "--keep", "0-3", "--metric", "energy"], 2, "--metric and --allow-missing"),
        (["prune", "example:tiny", "OUT", "--keep", "0-3", "--experts", "3"], 2, "--experts need each other"),
        (["prune", "example:tiny", "OUT", "--imatrix", "none", "-n", "3"], 5, "none: cannot open"),
        (["stats", "import", "IM.dat", "-o", "S"], 2, "pass --model"),
        (["stats", "import", "IM", "--model-top-k", "2", "-o", "S"], 2, "--model-top-k is for counts"),
        (["rank", "IM", "--metric", "frequency"], 3, "is an importance matrix, not a statistics file; pass it"),
        (["stats", "show", "IM"], 3, "is an importance matrix, not a statistics file"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_line(
    arguments: list[str], code: int, match: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    named = {"IM": str(files / "im.gguf"), "IM.dat": str(files / "im.dat")}
    assert match in refused(call(capsys, *(named.get(a, a) for a in arguments)), code)
    assert list(tmp_path.iterdir()) == []


def test_imported_statistics_go_where_statistics_go(
    files: Path, made: Matrix, tmp_path: Path, capsys: Capture
) -> None:
    stats = tmp_path / "general.stats"
    command = [
        "stats",
        "import",
        files / "im.gguf",
        "--model",
        "example:tiny",
        "--domain",
        "general",
        "-o",
        stats,
    ]
    ended = done(call(capsys, *command, "--json")).json()
    assert ended["metrics"] == ["frequency", "rms_count", "energy"]
    assert ended["tokens"] == {"general": 1024}
    shown = done(call(capsys, "stats", "show", stats)).out
    assert "imported from im.gguf; rank --metric frequency|rms_count|energy" in shown
    assert "share of routed tokens in the best n experts" in shown
    assert done(call(capsys, "stats", "show", stats, "--json")).json()["metrics"] == ended["metrics"]
    plan = tmp_path / "p.json"
    done(call(capsys, "plan", stats, "example:tiny", "--metric", "energy", "-n", "8", "-o", plan))
    ours = json.loads(plan.read_text())["layers"]
    options = ["--imatrix", files / "im.gguf", "--metric", "energy", "-n", "8"]
    direct = done(call(capsys, "plan", "example:tiny", *options)).json()
    assert ours == direct["layers"]
    message = refused(call(capsys, "plan", stats, "--metric", "energy", "--coverage", "0.9"), 3)
    assert "these statistics have no routing weights" in message
    message = refused(call(capsys, "plan", stats, "-n", "8"), 2)
    assert message.endswith("choose how to rank it: --metric frequency|rms_count|energy")
    message = refused(call(capsys, "rank", stats, "--metric", "reap"), 2)
    assert message.startswith("--metric reap: needs norms of the experts' outputs and routing weights, which")
    message = refused(call(capsys, "rank", stats, "--metric", "energy", "--protect-super-experts"), 2)
    assert message.startswith("--protect-super-experts needs peaks")
    done(call(capsys, "report", stats, "--plan", plan, "-o", tmp_path / "r.html"))
    page = (tmp_path / "r.html").read_text()
    assert "rms_count" in page
    assert "routing weight" not in page.split("coverage-section")[-1].split("<script")[0]
    # Without the model they are of no checkpoint in particular.
    done(call(capsys, "stats", "import", files / "im.gguf", "-o", tmp_path / "plain.stats"))
    loaded = load_statistics(tmp_path / "plain.stats")
    assert (loaded.identity, loaded.known) == (None, ("count", "down_input"))
    assert "checkpoint not known" in done(call(capsys, "stats", "show", tmp_path / "plain.stats")).out
    options = ["--metric", "rms_count", "-n", "8"]
    with_model = done(call(capsys, "plan", tmp_path / "plain.stats", "example:tiny", *options)).json()
    assert with_model["layers"] == [best(made, "rms_count", layer, 8) for layer in range(4)]
    done(call(capsys, "plan", tmp_path / "plain.stats", *options, "--model-type", "gpt_oss"))


def test_merged_with_what_profile_measured_only_counts_are_left(
    files: Path, inputs: Path, tmp_path: Path, capsys: Capture
) -> None:
    stats = tmp_path / "general.stats"
    done(call(capsys, "stats", "import", files / "im.gguf", "--model", "example:tiny", "-o", stats))
    both = tmp_path / "both.stats"
    ended = done(call(capsys, "stats", "merge", stats, inputs / "both.stats", "-o", both))
    assert (
        "energy, gate, norm, output, peak, peak_abs, weighted_norm: not in all of the statistics" in ended.err
    )
    merged, parts = load_statistics(both), (load_statistics(stats), load_statistics(inputs / "both.stats"))
    assert merged.known == ("count",)
    for total, a, b in zip(merged.over(), *(part.over() for part in parts), strict=True):
        np.testing.assert_array_equal(total.count, a.count + b.count)
