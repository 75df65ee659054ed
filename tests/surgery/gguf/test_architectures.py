"""Pruned files of every architecture, byte for byte against numpy's indexing of what the gguf package reads."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFReader

from moe_surgery import plan_random, prune
from moe_surgery.errors import PlanMismatchError
from tests.support.gguf_parts import moe_blocks
from tests.support.gguf_pruning import draw, prune_to
from tests.support.gguf_slicer import brute_force_slices
from tests.support.tiny_ggufs import ARCHITECTURES, LOADABLE_TYPES, MERGING, write_tiny_gguf

TABLE = "ffn_gate_tid2eid.weight"
"""Whose values are renumbered."""
PRUNED = [name for name in ARCHITECTURES if name != "grovemoe"]
TYPES = [name for name in LOADABLE_TYPES if name != "Q2_0"]  # which the gguf package does not know


def stored(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(path).tensors}


@pytest.mark.parametrize("architecture", PRUNED)
def test_slices(tmp_path: Path, architecture: str) -> None:
    row = ARCHITECTURES[architecture]
    source = write_tiny_gguf(
        tmp_path / "full.gguf", architecture, types=("Q4_0", "Q8_0", "MXFP4"), dense="Q8_0"
    )
    for count in (4, 6 if row.groups else 5):
        kept = draw(architecture, count, seed=count)
        cut = prune_to(source, tmp_path / f"{count}.gguf", kept, mtp="drop" if row.mtp else None)
        expected = brute_force_slices(source, kept)
        after = tuple(f"blk.{block}." for block in moe_blocks(row)[1])
        expected = {name: data for name, data in expected.items() if not name.startswith(after or ("?",))}
        found = stored(cut)
        assert list(found) == list(expected)
        different = [name for name in found if found[name] != expected[name].tobytes()]
        assert [name for name in different if not name.endswith(TABLE)] == []
        fields = GGUFReader(cut).fields
        assert fields[f"{architecture}.expert_count"].contents() == count


@pytest.mark.parametrize("kind", TYPES)
def test_types(tmp_path: Path, kind: str) -> None:
    source = write_tiny_gguf(tmp_path / "full.gguf", "gpt-oss", types=kind, layers=1)
    kept = {0: [1, 2, 3, 6, 7]}
    expected = brute_force_slices(source, kept)
    found = stored(prune_to(source, tmp_path / "cut.gguf", kept))
    assert found == {name: data.tobytes() for name, data in expected.items()}


@pytest.mark.parametrize("architecture", MERGING)
def test_gate_and_up_in_one_tensor(tmp_path: Path, architecture: str) -> None:
    source = write_tiny_gguf(tmp_path / "full.gguf", architecture, merged=True)
    kept = draw(architecture, 4, seed=1)
    found = stored(prune_to(source, tmp_path / "cut.gguf", kept))
    assert found == {name: data.tobytes() for name, data in brute_force_slices(source, kept).items()}


@pytest.mark.parametrize(("architecture", "experts"), [("grovemoe", 8), ("llama4", 128)])
def test_counts_that_llama_cpp_ties_to_the_model(tmp_path: Path, architecture: str, experts: int) -> None:
    source = write_tiny_gguf(tmp_path / "full.gguf", architecture, experts=experts, layers=1, hidden=32)
    with pytest.raises(PlanMismatchError, match="cannot be pruned"):
        prune(source, tmp_path / "cut.gguf", lambda model: plan_random(4, 0, model))
    assert sorted(tmp_path.iterdir()) == [source]
