"""Matrices of llama.cpp's own graphs, of every architecture: none is refused for its model, all are for another."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from moe_surgery import plan_from_ranking, prune
from moe_surgery.errors import InvalidInputError, PlanMismatchError
from moe_surgery.selection.imatrix.models import cut_for_plan, open_weights, rank_imatrix
from moe_surgery.selection.imatrix.statistics import statistics_from_imatrix
from moe_surgery.selection.statistics import Statistics
from tests.support.imatrices import GATE, Matrix, Sums, write_gguf_imatrix, write_legacy_imatrix
from tests.support.llama_process import MISSING, Llama
from tests.support.tiny_ggufs import ARCHITECTURES, write_tiny_gguf

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

ROOT = Path(__file__).parents[2]
CHUNK, CHUNKS = 200, 2
UNSOLVABLE = {"llama4", "smallthinker", "nemotron_h_moe", "gemma4"}
"""Whose experts read something else than the router."""


@pytest.fixture(scope="module")
def llama() -> Iterator[Llama]:
    with Llama() as llama:
        yield llama


def read(model: Path, matrix: Path) -> Statistics:
    with open_weights(model) as (weights, identity):
        return statistics_from_imatrix(matrix, weights, identity=identity, chunk_size=CHUNK)


def measured(llama: Llama, model: Path) -> Matrix:
    """Of random tokens."""
    rng = np.random.default_rng(0)
    total: Matrix = {}
    for _ in range(CHUNKS):
        run = llama.run(model, rng.integers(0, 96, CHUNK).tolist(), imatrix=True)
        for name, squares in run.squares.items():
            sums = total.setdefault(name, Sums(np.zeros_like(squares), np.zeros_like(run.counts[name])))
            sums.squares += squares
            sums.counts += run.counts[name]
    return total


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_matrix_fits_its_model_and_no_other(architecture: str, llama: Llama, tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "model.gguf", architecture, types="F16")
    total = measured(llama, model)
    exact = read(model, write_gguf_imatrix(tmp_path / "im.gguf", total, chunk_size=CHUNK))
    assert exact.known == ("count", "down_input", "energy")
    assert all(layer.count.sum() == CHUNK * CHUNKS * exact.top_k for layer in exact.over())

    legacy = write_legacy_imatrix(tmp_path / "im.dat", total, chunk_size=CHUNK)
    if architecture in UNSOLVABLE:
        with pytest.raises(InvalidInputError, match="cannot be solved for in this architecture"):
            read(model, legacy)
    else:
        for a, b in zip(read(model, legacy).over(), exact.over(), strict=True):
            assert np.abs(a.count - b.count).max() <= 1

    for sums in total.values():  # as if the weight of the norm were another
        sums.squares *= np.linspace(1, 3, sums.squares.shape[1])
    write_gguf_imatrix(tmp_path / "other.gguf", total)
    if architecture not in UNSOLVABLE:
        with pytest.raises(PlanMismatchError, match="inputs divided by the weight of the norm"):
            read(model, tmp_path / "other.gguf")
    first = next((name for name in total if name.endswith(GATE)), None)
    if first is not None:
        total[first].squares = total[first].squares[:, :-1]
        write_gguf_imatrix(tmp_path / "other.gguf", total)
        with pytest.raises(PlanMismatchError, match="the matrix is of another model"):
            read(model, tmp_path / "other.gguf")


def test_llama_cpp_quantises_a_pruned_model_with_the_cut_matrix(llama: Llama, tmp_path: Path) -> None:
    """It refuses a matrix of another size, such as that of the full model."""
    full, pruned, cut = (tmp_path / name for name in ("full.gguf", "pruned.gguf", "cut.gguf"))
    write_tiny_gguf(full, "qwen3moe", types="F16", dense="F16", hidden=256)
    matrix = write_gguf_imatrix(tmp_path / "im.gguf", measured(llama, full))
    plan = plan_from_ranking(rank_imatrix(matrix, full), 5)
    prune(full, pruned, plan)
    cut_for_plan(matrix, full, plan, cut)

    out, other = tmp_path / "q.gguf", tmp_path / "other.gguf"
    command = [sys.executable, "-m", "tests.support.llama_quantize"]
    jobs = [full, other, matrix, pruned, out, cut, pruned, other, matrix]
    done = subprocess.run([*command, *jobs], cwd=ROOT, capture_output=True, text=True, check=True)
    kept, cut_to_fit, refused = map(int, done.stdout.split())
    assert (kept, cut_to_fit) == (0, 0), done.stderr
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out).tensors}
    assert types["blk.0.ffn_up_exps.weight"] == "Q2_K"
    assert refused != 0
    assert "imatrix size" in done.stderr
