"""Importance matrices as files: both forms come back, what is damaged or something else is one clear line."""

from __future__ import annotations

import logging
import struct
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_surgery.checkpoint.gguf.model_file import GgufModel
from moe_surgery.checkpoint.kinds import GGUF, IMATRIX, kind_of
from moe_surgery.checkpoint.local_file import LocalFolder
from moe_surgery.errors import InvalidInputError, MoeSurgeryError, OutputError, PlanMismatchError
from moe_surgery.families.gguf import identify_gguf
from moe_surgery.selection.imatrix import load_imatrix
from moe_surgery.selection.imatrix.counts import Routed, solve_counts
from moe_surgery.selection.imatrix.legacy import parse_legacy
from moe_surgery.selection.imatrix.models import open_weights, rank_imatrix
from moe_surgery.selection.imatrix.statistics import statistics_from_imatrix
from moe_surgery.selection.imatrix.weights import GgufWeights
from tests.support.imatrices import (
    DOWN,
    GATE,
    ROUTER,
    Matrix,
    simulate,
    write_gguf_imatrix,
    write_legacy_imatrix,
)
from tests.support.sources import MemoryFolder
from tests.support.tiny_families import FAMILIES
from tests.support.tiny_ggufs import write_tiny_gguf

HIDDEN, FF, TOKENS = 24, 16, 512


def made(seed: int = 0, experts: int = 6, unused: int = 1, norm: np.ndarray | None = None) -> Matrix:
    weights = {n: np.linspace(0.5, 2, HIDDEN) if norm is None else norm for n in (1, 2)}
    return simulate(weights, FF, experts=experts, top_k=2, tokens=TOKENS, seed=seed, unused=unused)


def refusal(path: Path) -> str:
    with pytest.raises(InvalidInputError) as caught:
        load_imatrix(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert text.isprintable()
    return text.removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", ["imatrix.gguf", "imatrix_unsloth.gguf_file", "m"])
def test_the_form_of_gguf_comes_back(name: str, tmp_path: Path) -> None:
    matrix = made()
    write_gguf_imatrix(tmp_path / name, matrix, datasets=["a.txt", "b.txt"], chunk_size=64)
    assert kind_of(tmp_path / name) is IMATRIX
    read = load_imatrix(tmp_path / name)
    assert (read.datasets, read.chunks, read.chunk_size, read.legacy) == (("a.txt", "b.txt"), 8, 64, False)
    assert read.entries.keys() == matrix.keys()
    for entry_name, sums in matrix.items():
        np.testing.assert_array_equal(read.entries[entry_name].sums, sums.squares.astype(np.float32))
        np.testing.assert_array_equal(read.entries[entry_name].counts, sums.counts)
    assert [block.number for block in read.blocks()] == [1, 2]


@pytest.mark.parametrize("tail", [True, False])
def test_the_legacy_form_is_solved(tail: bool, tmp_path: Path) -> None:
    matrix = made(unused=2)
    path = write_legacy_imatrix(tmp_path / "imatrix.dat", matrix, chunk_size=64, tail=tail)
    assert kind_of(path) is IMATRIX
    read = load_imatrix(path)
    assert read.legacy
    assert (read.datasets, read.chunks) == ((("calibration_datav3.txt",), 8) if tail else ((), 0))
    solved = solve_counts(read, Routed(6, 2, lambda _: None), 64)
    for name, sums in matrix.items():
        counts = solved.entries[name].counts
        assert counts is not None
        assert np.abs(counts - sums.counts).max() <= 1
        np.testing.assert_allclose(solved.entries[name].sums, sums.squares, rtol=2e-2)
    assert (solved.entries[f"blk.1.{GATE}"].counts[-2:] == 0).all()  # type: ignore[index]
    assert max(solved.residuals.values()) < 1e-5


def test_tokens_are_those_of_all_chunks_where_several_make_a_call(tmp_path: Path) -> None:
    """As in ik_llama.cpp, which evaluates several chunks at once and counts evaluations."""
    matrix = made()
    path = write_legacy_imatrix(tmp_path / "m.dat", matrix, chunk_size=TOKENS, chunks=8)
    solved = solve_counts(load_imatrix(path), Routed(6, 2, lambda _: None), TOKENS // 8)
    for name in (f"blk.1.{GATE}", f"blk.2.{ROUTER}"):
        np.testing.assert_array_equal(solved.entries[name].counts, matrix[name].counts)
        np.testing.assert_allclose(solved.entries[name].sums, matrix[name].squares, rtol=1e-5)


def test_weights_on_the_hub_are_read_only_when_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tiny_gguf(tmp_path / "model.gguf", "olmoe", types="Q4_0")
    with GgufModel.open(MemoryFolder(tmp_path), "model.gguf") as model:
        weights = GgufWeights(identify_gguf(model), model)
        norms = {n: weights.norm(n) for n in weights.spec.layer_numbers}
        shape = weights.shape(f"blk.0.{DOWN}")
        assert shape is not None
        matrix = simulate(norms, shape[1], experts=8, top_k=2, tokens=64)  # type: ignore[arg-type]
        write_gguf_imatrix(tmp_path / "im.gguf", matrix)
        with caplog.at_level(logging.WARNING, "moe_surgery"):
            unread = statistics_from_imatrix(tmp_path / "im.gguf", weights)
        assert unread.known == ("count", "down_input")
        assert "no energies: the weights of experts are on the hub" in caplog.text
        assert statistics_from_imatrix(tmp_path / "im.gguf", weights, energy=True).known[-1] == "energy"


def test_a_safetensors_model_of_another_family_is_ranked_by_its_layers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.support.tiny_checkpoints import save

    folder = save(next(f for f in FAMILIES if f.model_type == "qwen3_moe"), tmp_path / "qwen")
    with open_weights(folder) as (weights, _):
        numbers, experts, top_k = weights.spec.layer_numbers, weights.spec.experts, weights.spec.top_k
    matrix = simulate({n: np.ones(HIDDEN) for n in numbers}, FF, experts=experts, top_k=top_k, tokens=TOKENS)
    ranking = rank_imatrix(write_gguf_imatrix(tmp_path / "m", matrix), folder)
    assert ranking.provenance["method"] == "rms_count"
    assert ranking.model_type == "qwen3_moe"
    other = simulate(
        {n: np.ones(HIDDEN) for n in numbers}, FF, experts=experts + 1, top_k=top_k, tokens=TOKENS
    )
    write_gguf_imatrix(tmp_path / "m", other)
    with pytest.raises(PlanMismatchError, match=f"has {experts + 1} experts, but .* has {experts}"):
        rank_imatrix(tmp_path / "m", folder)


@given(st.integers(0, 10_000), st.integers(3, 20), st.integers(1, 3))
@settings(max_examples=40)
def test_counts_are_solved_whatever_the_routes(seed: int, experts: int, top_k: int) -> None:
    norm = {0: np.exp(np.random.default_rng(seed).normal(size=64))}
    matrix = simulate(norm, 8, experts=experts, top_k=top_k, tokens=TOKENS, seed=seed)
    raw = bytearray(struct.pack("<i", len(matrix)))
    for name, sums in matrix.items():
        mean = sums.squares / np.maximum(sums.counts, 1)[:, None]
        values = np.where(sums.counts[:, None] > 0, mean, 1) * 2
        raw += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 2, values.size)
        raw += values.astype("<f4").tobytes()
    read = parse_legacy(np.frombuffer(bytes(raw), np.uint8), "m", "")
    solved = solve_counts(read, Routed(experts, top_k, lambda _: None), TOKENS // 2)
    counts = solved.entries[f"blk.0.{GATE}"].counts
    assert counts is not None
    assert np.abs(counts - matrix[f"blk.0.{GATE}"].counts).max() <= 1


def test_experts_that_saw_the_same_token_only_share_it_evenly(tmp_path: Path) -> None:
    """As those that llama-imatrix sends the token at the start of every chunk to."""
    matrix = simulate({0: np.ones(HIDDEN)}, FF, experts=6, top_k=2, tokens=TOKENS, unused=2)
    first = np.random.default_rng(1).normal(size=HIDDEN)
    first /= np.sqrt((first**2).mean())
    for name in (GATE, "ffn_up_exps.weight", DOWN):
        sums = matrix[f"blk.0.{name}"]
        sums.squares[4:] = 8 * (first**2 if name != DOWN else np.arange(FF) + 1.0)
        sums.counts[4:] = 8
    router = matrix[f"blk.0.{ROUTER}"]
    router.squares += 8 * first**2
    router.counts += 8
    path = write_legacy_imatrix(tmp_path / "m.dat", matrix, chunk_size=TOKENS + 8)
    solved = solve_counts(load_imatrix(path), Routed(6, 2, lambda _: None), TOKENS + 8)
    np.testing.assert_array_equal(solved.entries[f"blk.0.{GATE}"].counts, matrix[f"blk.0.{GATE}"].counts)


def test_every_prefix_of_either_form_is_refused(tmp_path: Path) -> None:
    matrix = made(experts=3)
    for write in (write_gguf_imatrix, write_legacy_imatrix):
        whole = write(tmp_path / "whole", matrix).read_bytes()
        file = tmp_path / "cut"
        # Readable: legacy files without what follows the entries, GGUF without the padding of the last tensor.
        legacy = write is write_legacy_imatrix
        readable = (
            [len(whole) - 8 - 22, len(whole) - 4 - 22] if legacy else range(len(whole) - 28, len(whole))
        )
        for end in {*range(0, 600, 3), *range(600, len(whole), 97), len(whole) - 29, len(whole) - 1} - {
            *readable
        }:
            file.write_bytes(whole[:end])
            refusal(file)


@given(st.data())
@settings(max_examples=50)
def test_damage_never_gives_anything_but_an_error_or_numbers(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write = data.draw(st.sampled_from([write_gguf_imatrix, write_legacy_imatrix]))
        path = write(Path(folder) / "m", made(experts=3))
        raw = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, min(len(raw), 1200) - 1))
            raw[at] = data.draw(st.integers(0, 255))
        path.write_bytes(raw)
        with suppress(MoeSurgeryError):
            for entry in load_imatrix(path).entries.values():
                assert np.isfinite(entry.sums).all()


def test_values_that_cannot_be(tmp_path: Path) -> None:
    matrix = made()
    path = tmp_path / "m"

    def damaged(write: object = write_gguf_imatrix) -> str:
        write(path, matrix)  # type: ignore[operator]
        return refusal(path)

    matrix[f"blk.1.{GATE}"].squares[0, 0] = np.nan
    assert "holds values that are negative or not finite" in damaged()
    assert "holds values that are negative or not finite" in damaged(write_legacy_imatrix)
    matrix[f"blk.1.{GATE}"].squares[0, 0] = -1
    assert "holds values that are negative" in damaged()
    matrix = made()
    matrix[f"blk.1.{GATE}"].squares[-1] = 1
    assert "has sums over no token" in damaged()
    matrix = made()
    matrix[f"blk.1.{GATE}"].counts = matrix[f"blk.1.{GATE}"].counts[:-1]
    assert "has 5 counts, but" in damaged()
    matrix = made()
    matrix[f"blk.1.{GATE}"].counts = matrix[f"blk.1.{GATE}"].counts + 0.5
    assert "counts that are not whole" in damaged()


def test_tensors_that_other_writers_add_are_ignored_and_halves_of_entries_are_not(tmp_path: Path) -> None:
    matrix = made()
    name = f"blk.1.{GATE}"
    for extra, missing in (
        ({f"{name}.in_sum": np.zeros(3)}, ()),
        ({}, (f"{name}.counts",)),
        ({}, (f"{name}.in_sum2",)),
    ):
        path = write_gguf_imatrix(tmp_path / "m", matrix, extra=extra, leave_out=missing)
        if missing:
            assert refusal(path) == f"'{name}' has no {missing[0].rpartition('.')[2]}"
        else:
            assert load_imatrix(path).entries.keys() == matrix.keys()


def test_what_is_not_a_matrix_is_named(tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "model-imatrix.gguf", "olmoe")
    assert kind_of(model) is GGUF
    assert "is a model (olmoe), not an importance matrix" in refusal(model)
    texts = tmp_path / "texts"
    texts.write_text("Once upon a time there was a matrix that nobody had made. " * 20)
    assert "is not an importance matrix" in refusal(texts)
    plan = tmp_path / "plan.json"
    plan.write_text('{"format": "moe-surgery.plan", "version": 1}')
    assert refusal(plan).startswith("is a plan, not an importance matrix; ")
    (tmp_path / "empty").write_bytes(b"")
    assert "is empty" in refusal(tmp_path / "empty")
    with pytest.raises(OutputError):
        load_imatrix(tmp_path / "none")
    writer = GGUFWriter(tmp_path / "adapter.gguf", "llama")
    writer.add_type("adapter")
    writer.add_tensor("x", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "general.type is adapter" in refusal(tmp_path / "adapter.gguf")


def test_trailing_data_and_doubled_entries_of_a_legacy_file(tmp_path: Path) -> None:
    path = write_legacy_imatrix(tmp_path / "m.dat", made())
    whole = path.read_bytes()
    path.write_bytes(whole + b"more")
    assert "has 4 bytes after its last entry" in refusal(path)
    name = f"blk.1.{ROUTER}".encode()
    entry = struct.pack("<i", len(name)) + name + struct.pack("<iif", 1, 1, 1.0)
    path.write_bytes(struct.pack("<i", 2) + entry + entry)
    assert "has two entries" in refusal(path)
    path.write_bytes(struct.pack("<i", 1) + entry[: len(name) + 4] + struct.pack("<ii", 0, 1) + bytes(4))
    assert "both must be positive" in refusal(path)


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("gpt-oss", "MXFP4"),
        ("qwen3moe", "Q4_K"),
        ("olmoe", "Q8_0"),
        ("glm4moe", "BF16"),
        ("deepseek2", "IQ4_XS"),
    ],
)
def test_matrices_of_other_architectures_rank_their_models(
    architecture: str, kind: str, tmp_path: Path
) -> None:
    """Energies against the gguf package's dequantisation of the whole tensor."""
    import gguf
    from gguf.quants import dequantize

    path = write_tiny_gguf(tmp_path / "model.gguf", architecture, types=kind)
    with GgufModel.open(LocalFolder(tmp_path), "model.gguf") as model:
        spec = identify_gguf(model)
        hidden = model.tensors["token_embd.weight"].shape[-1]
        ff = model.tensors[f"blk.{spec.layer_numbers[0]}.{DOWN}"].shape[-1]
        with open_weights(path) as (weights, _):
            norms = {n: weights.norm(n) for n in spec.layer_numbers}
    assert all(norm is not None and norm.size == hidden for norm in norms.values())
    matrix = simulate(norms, ff, experts=8, top_k=2, tokens=256, unused=1)  # type: ignore[arg-type]
    write_gguf_imatrix(tmp_path / "im.gguf", matrix)
    with open_weights(path) as (weights, identity):
        result = statistics_from_imatrix(tmp_path / "im.gguf", weights, identity=identity)
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for number, layer in zip(spec.layer_numbers, result.over(), strict=True):
        name = f"blk.{number}.{DOWN}"
        down = (
            dequantize(tensors[name].data, tensors[name].tensor_type)
            .astype(np.float64)
            .reshape(8, hidden, ff)
        )
        expected = np.einsum("ei,eri->e", matrix[name].squares, down**2)
        np.testing.assert_allclose(layer.of("energy"), expected, rtol=1e-5)
    assert rank_imatrix(tmp_path / "im.gguf", path).layer_numbers == result.layer_numbers == spec.moe_layers
    # Another model of the same shape has other norms.
    other = write_tiny_gguf(tmp_path / "other.gguf", architecture, types=kind, seed=1)
    same = all(np.allclose(a, b) for a, b in zip(_norms(path).values(), _norms(other).values(), strict=True))
    if not same:
        with pytest.raises(PlanMismatchError, match="inputs divided by the weight of the norm"):
            rank_imatrix(tmp_path / "im.gguf", other)


def _norms(path: Path) -> dict[int, np.ndarray]:
    with open_weights(path) as (weights, _):
        return {n: weights.norm(n) for n in weights.spec.layer_numbers}  # type: ignore[misc]
