"""Importance matrices against what transformers' model does on the same tokens, and arithmetic in float64."""

from __future__ import annotations

import logging
from pathlib import Path

import gguf
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from moe_surgery.checkpoint.resolve import resolve  # noqa: E402
from moe_surgery.errors import InvalidInputError, PlanMismatchError, UsageError  # noqa: E402
from moe_surgery.examples.skills import documents  # noqa: E402
from moe_surgery.pipeline.exporting import export_gguf  # noqa: E402
from moe_surgery.runtime.text import Text  # noqa: E402
from moe_surgery.selection.imatrix import load_imatrix  # noqa: E402
from moe_surgery.selection.imatrix.models import cut_for_plan, open_weights, rank_imatrix  # noqa: E402
from moe_surgery.selection.imatrix.statistics import best_metric, statistics_from_imatrix  # noqa: E402
from moe_surgery.selection.metrics import score  # noqa: E402
from moe_surgery.selection.plan import plan_from_ranking  # noqa: E402
from moe_surgery.selection.statistics import Statistics, load_statistics, save_statistics  # noqa: E402
from tests.support.imatrices import (  # noqa: E402
    DOWN,
    GATE,
    ROUTER,
    Matrix,
    measure,
    write_gguf_imatrix,
    write_legacy_imatrix,
)
from tests.support.routed import Routed  # noqa: E402

CHUNK, CHUNKS = 256, 8
LAYERS, EXPERTS, TOP_K = 4, 32, 4


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    """Chunks of tokens of two domains."""
    text = Text("example:tiny")
    tokens: list[int] = []
    for domain in ("arithmetic", "facts"):
        part: list[int] = []
        for document in documents(domain, 200, seed=3):
            part += text.encode(document)
        assert len(part) >= CHUNK * CHUNKS // 2
        tokens += part[: CHUNK * CHUNKS // 2]
    return [tokens[i : i + CHUNK] for i in range(0, len(tokens), CHUNK)]


@pytest.fixture(scope="module")
def routed() -> Routed:
    return Routed(resolve("example:tiny"))


@pytest.fixture(scope="module")
def measured(routed: Routed, sequences: list[list[int]]) -> Matrix:
    return measure(routed, sequences)


@pytest.fixture(scope="module")
def files(measured: Matrix, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny.gguf, imatrix.gguf, imatrix.dat (legacy) and raw.dat (with plain sums)."""
    folder = tmp_path_factory.mktemp("imatrix")
    export_gguf("example:tiny", folder / "tiny.gguf")
    write_gguf_imatrix(folder / "imatrix.gguf", measured, chunk_size=CHUNK)
    write_legacy_imatrix(folder / "imatrix.dat", measured, chunk_size=CHUNK)
    write_legacy_imatrix(folder / "raw.dat", measured, chunk_size=CHUNK, raw=True)
    return folder


def read(files: Path, name: str, model: str | Path | None = "example:tiny", **options: object) -> Statistics:
    if model is None:
        return statistics_from_imatrix(files / name, **options)  # type: ignore[arg-type]
    with open_weights(model) as (weights, identity):
        return statistics_from_imatrix(files / name, weights, identity=identity, **options)  # type: ignore[arg-type]


def counts(statistics: Statistics) -> np.ndarray:
    return np.stack([layer.count for layer in statistics.over()])


def true_counts(measured: Matrix) -> np.ndarray:
    return np.stack([measured[f"blk.{n}.{GATE}"].counts for n in range(LAYERS)])


def test_counts_are_the_routes_that_profile_counts(files: Path, sequences: list[list[int]]) -> None:
    from moe_surgery.quality.corpus import Passage
    from moe_surgery.quality.profile import profile_passages
    from moe_surgery.runtime.load import load_model

    model = load_model("example:tiny", dtype=torch.float32, backend="reference")
    [profiled] = profile_passages(model, [Passage("x", tuple(s)) for s in sequences]).values()
    expected = np.stack([layer.count for layer in profiled])
    for source in (None, "example:tiny", files / "tiny.gguf"):
        result = read(files, "imatrix.gguf", source, energy=False)
        np.testing.assert_array_equal(counts(result), expected)
        assert (result.top_k, result.tokens) == (TOP_K, {"imatrix": CHUNK * CHUNKS})


def test_counts_of_a_legacy_file_are_solved_to_the_token(
    files: Path, measured: Matrix, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "moe_surgery"):
        solved = read(files, "imatrix.dat", chunk_size=CHUNK, energy=False)
    assert np.abs(counts(solved) - true_counts(measured)).max() <= 1
    assert "counts were solved for (relative residual at most" in caplog.text
    residual = solved.settings["residual"]
    assert isinstance(residual, float)
    assert residual < 1e-4
    exact = read(files, "imatrix.gguf", energy=False)
    for a, b in zip(solved.over(), exact.over(), strict=True):
        np.testing.assert_allclose(a.of("down_input"), b.of("down_input"), rtol=2e-3)
    # Without the length of a chunk all counts are in proportion, and rankings the same.
    guessed = read(files, "imatrix.dat", energy=False)
    assert np.abs(counts(guessed) - 2 * true_counts(measured)).max() <= 2
    # Files of early 2024: sums are there, and counts follow from the norm.
    raw = read(files, "raw.dat", energy=False)
    np.testing.assert_array_equal(counts(raw), true_counts(measured))


def test_legacy_files_need_the_model(files: Path) -> None:
    with pytest.raises(UsageError, match=r"imatrix\.dat: is in the legacy form.*pass `model`"):
        read(files, "imatrix.dat", None)


@pytest.mark.parametrize("model", ["example:tiny", "tiny.gguf"])
def test_energy_is_the_sum_over_channels(model: str, files: Path, measured: Matrix, routed: Routed) -> None:
    result = read(files, "imatrix.gguf", model if model.startswith("example:") else files / model)
    for number, layer in enumerate(result.over()):
        module = routed.layers[number].mlp.experts
        sums = measured[f"blk.{number}.{DOWN}"]
        for expert in range(EXPERTS):
            down = module.down_proj[expert].detach().double().numpy()  # [inputs, hidden]
            expected = sum(sums.squares[expert, i] * (down[i] ** 2).sum() for i in range(len(down)))
            np.testing.assert_allclose(layer.of("energy")[expert], expected, rtol=1e-6)
        np.testing.assert_allclose(layer.of("down_input"), sums.squares.sum(axis=1), rtol=1e-6)
    rms = np.stack(score("rms_count", result.over()))
    for number, row in enumerate(rms):
        sums = measured[f"blk.{number}.{DOWN}"]
        mean = sums.squares.sum(axis=1) / np.maximum(sums.counts, 1)
        np.testing.assert_allclose(row, np.sqrt(mean) * sums.counts, rtol=1e-6)


@pytest.mark.parametrize("metric", [None, "energy"])
def test_both_models_give_the_same_ranking_and_say_by_what(
    files: Path, metric: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "moe_surgery"):
        ours = rank_imatrix(files / "imatrix.gguf", "example:tiny", metric)
    assert ("experts are ranked by rms_count" in caplog.text) == (metric is None)
    theirs = rank_imatrix(files / "imatrix.gguf", files / "tiny.gguf", metric)
    assert ours.layers == theirs.layers
    assert (ours.model_type, ours.provenance["method"]) == ("gpt_oss", metric or "rms_count")
    assert theirs.model_type == "gpt_oss"


def test_energies_of_quantised_files_need_the_gguf_package(
    files: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf.quants", None)
    assert rank_imatrix(files / "imatrix.gguf", files / "tiny.gguf").provenance["method"] == "rms_count"
    with (
        caplog.at_level(logging.WARNING, "moe_surgery"),
        pytest.raises(UsageError, match="`metric` energy: needs energies"),
    ):
        rank_imatrix(files / "imatrix.gguf", files / "tiny.gguf", "energy")
    assert "no energies: " in caplog.text


def test_statistics_keep_what_they_have_and_say_what_they_have_not(files: Path, tmp_path: Path) -> None:
    result = read(files, "imatrix.gguf")
    save_statistics(result, tmp_path / "s")
    after = load_statistics(tmp_path / "s")
    assert after.known == result.known == ("count", "down_input", "energy")
    assert (after.identity, after.settings) == (result.identity, result.settings)
    for a, b in zip(result.over(), after.over(), strict=True):
        np.testing.assert_array_equal(a.of("energy"), b.of("energy"))
    assert best_metric(after) == "rms_count"
    with pytest.raises(
        UsageError, match=r"`metric` reap: needs norms of .* which these statistics do not have"
    ):
        score("reap", after.over())
    plain = read(files, "imatrix.gguf", None)
    save_statistics(plain, tmp_path / "s")
    after = load_statistics(tmp_path / "s")
    assert (after.model_type, after.identity, after.known) == (None, None, ("count", "down_input"))


@pytest.fixture
def changed(measured: Matrix) -> Matrix:
    return {name: type(s)(s.squares.copy(), s.counts.copy()) for name, s in measured.items()}


def test_a_matrix_of_another_model_is_refused_with_the_check_that_failed(
    files: Path, changed: Matrix, measured: Matrix, tmp_path: Path
) -> None:
    def refused(match: str, form: str = "gguf") -> None:
        if form == "gguf":
            write_gguf_imatrix(tmp_path / "m", changed)
        else:
            write_legacy_imatrix(tmp_path / "m", changed, chunk_size=CHUNK)
        with pytest.raises((PlanMismatchError, InvalidInputError), match=match) as caught:
            read(tmp_path, "m", energy=False)
        assert str(caught.value).startswith(f"{tmp_path / 'm'}: ")
        assert str(caught.value).isprintable()
        changed.update({n: type(s)(s.squares.copy(), s.counts.copy()) for n, s in measured.items()})

    for number in range(LAYERS):  # inputs of a model whose norm has other weights
        for name in (ROUTER, GATE, "ffn_up_exps.weight"):
            changed[f"blk.{number}.{name}"].squares *= np.linspace(1, 3, 160)
    refused(r"block 0: inputs divided by the weight of the norm .* mean square of \d\.\d+, not 1")
    changed[f"blk.1.{GATE}"].squares[:, 3] *= 2
    refused(r"block 1: the experts' inputs do not add up to 4 times the router's \(off by ")
    changed[f"blk.1.{GATE}"].squares[:] = np.random.default_rng(0).random((EXPERTS, 160))
    refused(r"block 1: the experts' inputs do not add up to 4 times the router's", "legacy")
    for name in (GATE, "ffn_up_exps.weight", DOWN):
        changed[f"blk.2.{name}"].counts[5] += 7
    refused(r"block 2: 8,199 tokens in all experts, but 4 experts for each of 2,048 tokens make 8,192")
    changed[f"blk.3.{DOWN}"].counts[0] += 1
    refused(r"block 3: ffn_down_exps.weight has other counts")
    changed["blk.7." + GATE] = changed[f"blk.3.{GATE}"]
    refused(r"has experts in block 7, but the layers with experts of .* are 0 to 3")
    sums = changed[f"blk.0.{GATE}"]
    sums.squares, sums.counts = sums.squares[:16], sums.counts[:16]
    refused(r"blk\.0\.ffn_gate_exps\.weight has 16 x 160 values, but .* has 32 x 160 inputs")


@pytest.mark.parametrize("write", [write_gguf_imatrix, write_legacy_imatrix])
def test_layers_without_data_are_refused_unless_that_is_allowed(
    write: object, changed: Matrix, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [n for n in changed if n.startswith("blk.2.")]:
        del changed[name]
    write(tmp_path / "m.x", changed, chunk_size=CHUNK)  # type: ignore[operator]
    with pytest.raises(InvalidInputError, match=r"has no data for the experts of layer 2; add a matrix"):
        read(tmp_path, "m.x", chunk_size=CHUNK)
    with caplog.at_level(logging.WARNING, "moe_surgery"):
        result = read(tmp_path, "m.x", chunk_size=CHUNK, allow_missing=True)
    assert "no data for layer 2: the first experts" in caplog.text
    assert not counts(result)[2].any()
    assert counts(result)[[0, 1, 3]].any(axis=1).all()
    write_gguf_imatrix(tmp_path / "n", {"blk.0.attn_q.weight": changed[f"blk.0.{ROUTER}"]})
    with pytest.raises(InvalidInputError, match="has no experts"):
        read(tmp_path, "n")


def test_a_legacy_layer_without_its_router_has_no_counts(
    measured: Matrix, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_legacy_imatrix(tmp_path / "m.dat", measured, chunk_size=CHUNK, leave_out=[f"blk.1.{ROUTER}"])
    with pytest.raises(InvalidInputError, match="has no data for the experts of layer 1"):
        read(tmp_path, "m.dat", chunk_size=CHUNK)


def test_files_add_up(
    files: Path, routed: Routed, sequences: list[list[int]], measured: Matrix, tmp_path: Path
) -> None:
    halves = [measure(routed, sequences[: CHUNKS // 2]), measure(routed, sequences[CHUNKS // 2 :])]
    write_gguf_imatrix(tmp_path / "a", halves[0], datasets=["a.txt"])
    write_legacy_imatrix(tmp_path / "b", halves[1], chunk_size=CHUNK)
    with open_weights("example:tiny") as (weights, _):
        both = statistics_from_imatrix([tmp_path / "a", tmp_path / "b"], weights, chunk_size=CHUNK)
        with pytest.raises(InvalidInputError, match="is given twice"):
            statistics_from_imatrix([tmp_path / "a", tmp_path / "a"], weights)
    assert np.abs(counts(both) - true_counts(measured)).max() <= 1
    exact = read(files, "imatrix.gguf")
    for a, b in zip(both.over(), exact.over(), strict=True):
        np.testing.assert_allclose(a.of("energy"), b.of("energy"), rtol=5e-3, atol=1e-3)
    assert both.tokens == {"a": CHUNK * CHUNKS}


@pytest.mark.parametrize("name", ["imatrix.gguf", "imatrix.dat"])
def test_the_cut_matrix_is_the_rows_of_the_kept_experts(
    name: str, files: Path, measured: Matrix, tmp_path: Path
) -> None:
    ranking = rank_imatrix(files / "imatrix.gguf", "example:tiny")
    plan = plan_from_ranking(ranking, 13)
    cut_for_plan(files / name, files / "tiny.gguf", plan, tmp_path / "cut.gguf", chunk_size=CHUNK)
    reader = gguf.GGUFReader(tmp_path / "cut.gguf")
    names = [t.name for t in reader.tensors]
    assert sorted(n.removesuffix(".in_sum2").removesuffix(".counts") for n in names) == sorted(
        [*measured, *measured]
    )
    assert [n.removesuffix(".in_sum2") for n in names[::2]] == sorted(measured)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.chunk_size"] == CHUNK
    assert fields["imatrix.chunk_count"] == CHUNKS
    assert len(fields["imatrix.datasets"]) == 1
    tensors = {t.name: t for t in reader.tensors}
    for weight, sums in measured.items():
        number = int(weight.split(".")[1])
        kept = list(plan.layers[number]) if len(sums.counts) > 1 else [0]
        squares, chosen = tensors[f"{weight}.in_sum2"], tensors[f"{weight}.counts"]
        np.testing.assert_allclose(
            squares.data.reshape(len(kept), -1),
            sums.squares[kept],
            rtol=1e-5 if name.endswith("gguf") else 5e-2,
        )
        assert np.abs(chosen.data.ravel() - sums.counts[kept]).max() <= (0 if name.endswith("gguf") else 1)
        # llama-quantize wants ne0 * ne2 values.
        assert int(np.prod(squares.shape)) == sums.squares.shape[1] * len(kept)
    again = load_imatrix(tmp_path / "cut.gguf")
    assert again.entries[f"blk.0.{DOWN}"].experts == 13
    other = plan_from_ranking(ranking, 8)
    with pytest.raises(PlanMismatchError, match="other experts"):
        cut_for_plan(tmp_path / "cut.gguf", files / "tiny.gguf", other, tmp_path / "again.gguf")
    assert not (tmp_path / "again.gguf").exists()
