"""Counts of importance matrices are our own routing counts: llama.cpp and our runtime on the same tokens.

llama.cpp runs the bundled model in float32, with its own rounding of YaRN's borders on both sides, so that only a
token whose router logits tie within 1e-4 may take another expert.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from moe_surgery import export_gguf, load_model
from moe_surgery.checkpoint.resolve import resolve
from moe_surgery.examples.skills import documents
from moe_surgery.quality.corpus import Passage
from moe_surgery.quality.profile import profile_passages
from moe_surgery.runtime.text import Text
from moe_surgery.selection.imatrix import Imatrix, load_imatrix
from moe_surgery.selection.imatrix.counts import Routed, solve_counts
from tests.support.gguf_slicer import write_as_float32
from tests.support.imatrices import Matrix, Sums, write_gguf_imatrix, write_legacy_imatrix
from tests.support.llama_process import MISSING, Llama

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

CHUNK, CHUNKS = 256, 8
EXPERTS, TOP_K, LAYERS = 32, 4, 4


def passages() -> list[tuple[int, ...]]:
    """Of two domains, so that most experts are used."""
    text = Text("example:tiny")
    tokens: list[int] = []
    for domain in ("arithmetic", "facts"):
        part = [t for document in documents(domain, 200, seed=3) for t in text.encode(document)]
        tokens += part[: CHUNK * CHUNKS // 2]
    return [tuple(tokens[start : start + CHUNK]) for start in range(0, len(tokens), CHUNK)]


def routing_counts(checkpoint: Path) -> list[np.ndarray]:
    """By layer, of our own runtime in float32."""
    model = load_model(checkpoint, dtype=torch.float32)
    found = profile_passages(model, [Passage("text", tokens) for tokens in passages()])
    return [layer.count for layer in found["text"]]


def measured(gguf: Path) -> Matrix:
    """What llama-imatrix sums up, seen by the graph callback on each of the passages."""
    total: Matrix = {}
    with Llama() as llama:
        for tokens in passages():
            run = llama.run(gguf, tokens, imatrix=True)
            for name, squares in run.squares.items():
                sums = total.setdefault(name, Sums(np.zeros_like(squares), np.zeros_like(run.counts[name])))
                sums.squares += squares
                sums.counts += run.counts[name]
    return total


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `checkpoint`, `model.gguf`, and both forms of its matrix."""
    folder = tmp_path_factory.mktemp("imatrix")
    shutil.copytree(resolve("example:tiny"), folder / "checkpoint")
    config = json.loads((folder / "checkpoint" / "config.json").read_text())
    config["rope_scaling"]["truncate"] = True
    (folder / "checkpoint" / "config.json").write_text(json.dumps(config))
    export_gguf(folder / "checkpoint", folder / "export.gguf", tokenizer=False)
    write_as_float32(folder / "export.gguf", folder / "model.gguf")
    matrix = measured(folder / "model.gguf")
    write_gguf_imatrix(folder / "imatrix.gguf", matrix, chunk_size=CHUNK)
    write_legacy_imatrix(folder / "imatrix.dat", matrix, chunk_size=CHUNK)
    return folder


def counts_in(matrix: Imatrix) -> list[np.ndarray]:
    return [block.expert_input.counts for block in matrix.blocks()]


def test_counts_are_our_routing_counts(folder: Path) -> None:
    found, ours = counts_in(load_imatrix(folder / "imatrix.gguf")), routing_counts(folder / "checkpoint")
    assert len(found) == len(ours) == LAYERS
    for layer, (count, expected) in enumerate(zip(found, ours, strict=True)):
        assert count.sum() == expected.sum() == CHUNK * CHUNKS * TOP_K
        moved = int(np.abs(count - expected).sum()) // 2
        assert moved <= (0 if layer == 0 else expected.sum() // 1000)


def test_legacy_counts_are_solved_to_within_a_token(folder: Path) -> None:
    legacy = load_imatrix(folder / "imatrix.dat")
    assert legacy.legacy
    solved = solve_counts(legacy, Routed(EXPERTS, TOP_K, lambda block: None), CHUNK)
    for count, true in zip(counts_in(solved), counts_in(load_imatrix(folder / "imatrix.gguf")), strict=True):
        assert not true.all()
        assert np.abs(count - true).max() <= 1
