"""llama.cpp computes the same with a pruned GGUF file as with the whole one, whose dropped experts it may not choose.

The mask is set inside llama.cpp's graph: the scores of dropped experts become -inf as soon as they are
computed, before the softmax and before the selection. What remains is rounding, of softmax sums over fewer
terms and of activations that llama.cpp quantises: a few times 1e-7, unless an 8-bit activation flips. A slice taken
from the wrong place gives a ratio near 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from moe_surgery.errors import PlanMismatchError
from tests.support.gguf_pruning import Kept, distance, draw, exchanged, prune_to
from tests.support.gguf_slicer import slice_gguf
from tests.support.llama_process import MISSING, Llama, LlamaError
from tests.support.tiny_ggufs import ARCHITECTURES, LOADABLE_TYPES, MERGING, write_tiny_gguf

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

BOUND = 0.02
"""Of rms(masked - pruned) / rms(full - pruned)."""
TOKENS = np.random.default_rng(5).integers(0, 96, 48).tolist()
PRUNED = [name for name in ARCHITECTURES if name != "grovemoe"]  # which is refused
SMALL_TYPES = (
    "Q4_0",
    "Q8_0",
    "MXFP4",
    "Q5_1",
    "BF16",
    "IQ4_NL",
    "Q4_1",
    "F16",
    "Q5_0",
    "NVFP4",
    "F32",
    "Q2_0",
)
HASHED = "deepseek4"
"""Its first block looks experts up by token; those of tokens whose experts are gone are chosen anew."""
STANDING = [(name, SMALL_TYPES[i % len(SMALL_TYPES)]) for i, name in enumerate(PRUNED) if name != HASHED]
WIDE_TYPES = (
    "Q2_K",
    ("Q4_K", "Q4_K", "Q6_K"),
    "Q3_K",
    "Q5_K",
    "IQ2_XXS",
    "IQ3_S",
    "IQ4_XS",
    "IQ1_M",
    "TQ1_0",
    "TQ2_0",
)


@pytest.fixture(scope="module")
def llama() -> Iterator[Llama]:
    with Llama() as running:
        yield running


def name_of(types: str | tuple[str, ...]) -> str:
    return types if isinstance(types, str) else "+".join(dict.fromkeys(types))


def counts_of(architecture: str) -> tuple[int, int]:
    """Half of the 8 experts, and an odd number: of each group where there are groups."""
    return 4, (ARCHITECTURES[architecture].groups or 1) * (3 if ARCHITECTURES[architecture].groups else 5)


def ratio(llama: Llama, source: Path, pruned: Path, kept: Kept) -> float:
    full = llama.run(source, TOKENS).logits
    masked = llama.run(source, TOKENS, kept=kept).logits
    cut = llama.run(pruned, TOKENS).logits
    assert np.isfinite(full).all()
    effect = distance(full, cut)
    assert effect > 0.01 * distance(full, np.zeros_like(full))
    return distance(masked, cut) / effect


@pytest.mark.parametrize(("architecture", "kind"), STANDING, ids=lambda value: str(value))
def test_pruned_is_masked(llama: Llama, tmp_path: Path, architecture: str, kind: str) -> None:
    source = write_tiny_gguf(tmp_path / "full.gguf", architecture, types=kind)
    for count in counts_of(architecture):
        kept = draw(architecture, count, seed=count)
        pruned = prune_to(source, tmp_path / f"{count}.gguf", kept)
        assert ratio(llama, source, pruned, kept) < BOUND


@pytest.mark.parametrize("types", WIDE_TYPES, ids=name_of)
def test_types_of_wide_blocks(llama: Llama, tmp_path: Path, types: str | tuple[str, ...]) -> None:
    source = write_tiny_gguf(tmp_path / "full.gguf", "qwen3moe", types=types)
    kept = draw("qwen3moe", 5, seed=1)
    assert ratio(llama, source, prune_to(source, tmp_path / "cut.gguf", kept), kept) < BOUND


@pytest.mark.parametrize("architecture", MERGING)
def test_gate_and_up_in_one_tensor(llama: Llama, tmp_path: Path, architecture: str) -> None:
    source = write_tiny_gguf(tmp_path / "full.gguf", architecture, merged=True)
    kept = draw(architecture, 4, seed=2)
    assert ratio(llama, source, prune_to(source, tmp_path / "cut.gguf", kept), kept) < BOUND


def test_scales_of_experts(llama: Llama, tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "full.gguf", "qwen3moe", types="NVFP4", scales=True)
    kept = draw("qwen3moe", 5, seed=3)
    assert ratio(llama, source, prune_to(source, tmp_path / "cut.gguf", kept), kept) < BOUND


@pytest.mark.parametrize("architecture", PRUNED)
def test_all_experts_in_another_order(llama: Llama, tmp_path: Path, architecture: str) -> None:
    """Bit for bit, in orders that leave the sum in a softmax alone."""
    source = write_tiny_gguf(tmp_path / "full.gguf", architecture)
    shuffled = prune_to(source, tmp_path / "shuffled.gguf", exchanged(architecture))
    assert llama.run(shuffled, TOKENS).logits.tobytes() == llama.run(source, TOKENS).logits.tobytes()


@pytest.mark.parametrize("architecture", [name for name, row in ARCHITECTURES.items() if row.mtp is not None])
def test_multi_token_prediction_kept_or_dropped(llama: Llama, tmp_path: Path, architecture: str) -> None:
    source = write_tiny_gguf(tmp_path / "full.gguf", architecture, mtp=1)
    kept = draw(architecture, 4, seed=6)
    whole = prune_to(source, tmp_path / "keep.gguf", kept, mtp="keep")
    trunk = prune_to(source, tmp_path / "drop.gguf", kept, mtp="drop")
    assert trunk.stat().st_size < whole.stat().st_size
    assert ratio(llama, source, whole, kept) < BOUND
    assert llama.run(trunk, TOKENS).logits.tobytes() == llama.run(whole, TOKENS).logits.tobytes()


def test_a_table_of_experts_by_token(llama: Llama, tmp_path: Path) -> None:
    """The same as the whole model with the new table, written back in the old numbers."""
    source = write_tiny_gguf(tmp_path / "full.gguf", HASHED)
    kept = draw(HASHED, 5, seed=8)
    cut = prune_to(source, tmp_path / "cut.gguf", kept)
    name = "blk.0.ffn_gate_tid2eid.weight"
    tables = {path: next(t for t in GGUFReader(path).tensors if t.name == name) for path in (source, cut)}
    new = np.array(kept[0], np.int32)[tables[cut].data]
    old = tables[source].data
    alive = np.isin(old, kept[0]).all(1)
    assert alive.any()
    assert np.array_equal(new[alive], old[alive])
    assert all(len(set(row)) == len(row) for row in new.tolist())
    edited = bytearray(source.read_bytes())
    start = tables[source].data_offset
    edited[start : start + new.nbytes] = new.tobytes()
    (tmp_path / "edited.gguf").write_bytes(edited)
    assert ratio(llama, tmp_path / "edited.gguf", cut, kept) < BOUND


def test_split_files_in_and_out(llama: Llama, tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "full.gguf", "glm4moe")
    pieces = write_tiny_gguf(tmp_path / "split.gguf", "glm4moe", split=3)
    kept = draw("glm4moe", 5, seed=7)
    one = prune_to(source, tmp_path / "one.gguf", kept)
    joined = prune_to(pieces, tmp_path / "joined.gguf", kept)
    prune_to(source, tmp_path / "parts.gguf", kept, max_shard_size=300_000)
    first = min(tmp_path.glob("parts-00001-of-*.gguf"))
    expected = llama.run(one, TOKENS).logits.tobytes()
    assert llama.run(joined, TOKENS).logits.tobytes() == expected
    assert llama.run(first, TOKENS).logits.tobytes() == expected


@pytest.mark.parametrize("alignment", [16, 64, 4096])
def test_alignment(llama: Llama, tmp_path: Path, alignment: int) -> None:
    """llama.cpp maps tensors where they lie, and aborts where the first is not at a multiple of 32."""
    source = write_tiny_gguf(tmp_path / "full.gguf", "qwen3moe", alignment=alignment)
    kept = draw("qwen3moe", 5, seed=9)
    one = prune_to(source, tmp_path / "one.gguf", kept)
    assert ratio(llama, source, one, kept) < BOUND
    prune_to(source, tmp_path / "parts.gguf", kept, max_shard_size=60_000)
    first = min(tmp_path.glob("parts-00001-of-*.gguf"))
    assert llama.run(first, TOKENS).logits.tobytes() == llama.run(one, TOKENS).logits.tobytes()


def test_one_expert_alone(llama: Llama, tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "full.gguf", "llama")
    kept = {0: [3], 1: [6]}
    assert ratio(llama, source, prune_to(source, tmp_path / "cut.gguf", kept), kept) < BOUND


def test_the_yardstick_sees_a_slice_from_the_wrong_place(llama: Llama, tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "full.gguf", "qwen3moe")
    kept = {0: [0, 2, 5, 6], 1: [1, 2, 3, 7]}
    slice_gguf(source, tmp_path / "right.gguf", kept)
    assert ratio(llama, source, tmp_path / "right.gguf", kept) < BOUND
    slice_gguf(source, tmp_path / "wrong.gguf", {0: [0, 2, 5, 7], 1: [1, 2, 3, 7]})
    assert ratio(llama, source, tmp_path / "wrong.gguf", kept) > 10 * BOUND


def test_llama_cpp_refuses_a_count_that_is_not_the_tensors(llama: Llama, tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "full.gguf", "qwen3moe", metadata={"qwen3moe.expert_count": 7})
    with pytest.raises(LlamaError, match="wrong shape"):
        llama.run(source, TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [name for name in PRUNED if name != HASHED])
def test_every_type(llama: Llama, tmp_path: Path, architecture: str) -> None:
    wrong = {}
    for kind in LOADABLE_TYPES:
        source = write_tiny_gguf(tmp_path / "full.gguf", architecture, types=kind)
        for count in counts_of(architecture):
            kept = draw(architecture, count, seed=count)
            pruned = prune_to(source, tmp_path / "cut.gguf", kept, overwrite=True)
            found = ratio(llama, source, pruned, kept)
            print(f"{architecture} {kind} 8 -> {count}: {found:.1e}")
            if not found < BOUND:
                wrong[kind, count] = found
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [name for name in PRUNED if name != HASHED])
def test_every_count(llama: Llama, tmp_path: Path, architecture: str) -> None:
    """What llama.cpp would abort on is refused before."""
    source = write_tiny_gguf(tmp_path / "full.gguf", architecture)
    for count in range(1, 8):
        kept = draw(architecture, count, seed=count)
        try:
            pruned = prune_to(source, tmp_path / "cut.gguf", kept, overwrite=True)
        except PlanMismatchError:
            assert count < 4 or ARCHITECTURES[architecture].groups
        else:
            assert ratio(llama, source, pruned, kept) < BOUND
