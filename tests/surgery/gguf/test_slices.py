"""Bytes of a pruned GGUF file against a brute-force slicer, for architectures, types and split sets."""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_surgery import inspect, prune
from tests.support.gguf_slices import Kept, assert_pruned, read_set
from tests.support.raw_gguf import TYPES, TinyMoe, nbytes, read, write, write_split

from .models import DEEPSEEK, GEMMA4, GPT_OSS, pruned, rows, unsplit, write_hashed

MODELS = {
    "qwen3moe": TinyMoe(),
    "gpt-oss": GPT_OSS,
    "gemma4": GEMMA4,
    "llama4": TinyMoe("llama4", top_k=1),
    "hy_v3": TinyMoe("hy_v3", selection_bias="exp_probs_b"),
    "grovemoe": TinyMoe("grovemoe", extra={"ffn_up_chexps.weight": ("Q8_0", (32, 8, 8))}),
}
HALF, ODD = (1, 2, 5, 7), (0, 3, 4)
WIDE = {"Q4_K", "Q6_K", "IQ4_KS", "IQ2_KL"}


def kept_of(blocks: int, *rows: tuple[int, ...]) -> Kept:
    return {block: rows[block % len(rows)] for block in range(blocks)}


@pytest.mark.parametrize("kept", [HALF, ODD], ids=["half", "odd"])
@pytest.mark.parametrize("name", MODELS)
def test_architectures(tmp_path: Path, name: str, kept: tuple[int, ...]) -> None:
    source = MODELS[name].write(tmp_path / "m.gguf")
    pruned(source, tmp_path / "out.gguf", kept)
    assert_pruned(source, tmp_path / "out.gguf", kept_of(3, kept), 8)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "I32"])
def test_types_with_row_headers_and_interleaved_rows(tmp_path: Path, kind: str) -> None:
    side = 256 if kind in WIDE else 64
    source = TinyMoe(expert_type=kind, hidden=side, width=side, blocks=2).write(tmp_path / "m.gguf")
    pruned(source, tmp_path / "out.gguf", HALF)
    assert_pruned(source, tmp_path / "out.gguf", kept_of(2, HALF), 8)


def test_types_that_differ_within_a_layer(tmp_path: Path) -> None:
    types = {"ffn_down_exps": "Q4_0", "ffn_gate_inp": "BF16", "ffn_up_exps": "Q8_0_R8"}
    source = TinyMoe(types=types).write(tmp_path / "m.gguf")
    pruned(source, tmp_path / "out.gguf", ODD)
    assert_pruned(source, tmp_path / "out.gguf", kept_of(3, ODD), 8)


def test_layers_keep_different_experts_in_any_order(tmp_path: Path) -> None:
    source = TinyMoe().write(tmp_path / "m.gguf")
    each = [(7, 0, 3), (1, 2, 3), (6, 5, 4)]
    pruned(source, tmp_path / "out.gguf", *each)
    assert_pruned(source, tmp_path / "out.gguf", dict(enumerate(each)), 8)


def test_grouped_routing_and_mtp_blocks(tmp_path: Path) -> None:
    source = DEEPSEEK.write(tmp_path / "m.gguf")
    kept = (0, 2, 4, 7)
    pruned(source, tmp_path / "out.gguf", kept)
    blocks = read(tmp_path / "out.gguf")[0]["moe_surgery.kept_experts"].raw[-16:]  # of the MTP block, last
    last = [int.from_bytes(blocks[i : i + 4], "little") for i in range(0, 16, 4)]
    assert_pruned(source, tmp_path / "out.gguf", {1: kept, 2: kept, 3: last}, 8)
    assert sum(e < 4 for e in last) == 2
    router = read(source)[1]["blk.3.ffn_gate_inp.weight"]
    assert router.type == "F32"


@pytest.mark.parametrize("kind", ["F32", "BF16", "F16"])
def test_mtp_blocks_keep_the_largest_router_rows_of_each_group(tmp_path: Path, kind: str) -> None:
    sizes = [3.0, 9.0, 1.0, 5.0, 2.0, 0.5, 8.0, 4.0]
    packed = {
        "F32": lambda x: struct.pack("<f", x),
        "F16": lambda x: struct.pack("<e", x),
        "BF16": lambda x: struct.pack("<f", x)[2:],
    }[kind]
    model = replace(DEEPSEEK, types={"ffn_gate_inp": kind})
    tensors = [
        t._replace(data=b"".join(packed(-size) * 32 for size in sizes))
        if t.name == "blk.3.ffn_gate_inp.weight"
        else t
        for t in model.tensors()
    ]
    source = write(tmp_path / "m.gguf", model.entries(), tensors)
    pruned(source, tmp_path / "out.gguf", (0, 2, 4, 7))
    assert_pruned(source, tmp_path / "out.gguf", {1: (0, 2, 4, 7), 2: (0, 2, 4, 7), 3: (1, 3, 6, 7)}, 8)


def test_mtp_blocks_can_be_dropped(tmp_path: Path) -> None:
    source = DEEPSEEK.write(tmp_path / "m.gguf")
    pruned(source, tmp_path / "out.gguf", (0, 2, 4, 7), mtp="drop")
    assert_pruned(source, tmp_path / "out.gguf", kept_of(4, (0, 2, 4, 7)), 8, dropped=[3])


def test_mtp_experts_that_a_plan_lists(tmp_path: Path) -> None:
    source = DEEPSEEK.write(tmp_path / "m.gguf")
    listed = (1, 3, 5, 6)
    prune(source, tmp_path / "out.gguf", rows((0, 2, 4, 7), mtp=[listed]))
    assert_pruned(source, tmp_path / "out.gguf", {1: (0, 2, 4, 7), 2: (0, 2, 4, 7), 3: listed}, 8)


def test_a_quantised_router_of_an_mtp_block_keeps_the_first_experts_of_each_group(tmp_path: Path) -> None:
    source = replace(DEEPSEEK, types={"ffn_gate_inp": "Q8_0"}).write(tmp_path / "m.gguf")
    result = pruned(source, tmp_path / "out.gguf", (0, 2, 4, 7))
    kept = {1: (0, 2, 4, 7), 2: (0, 2, 4, 7), 3: (0, 1, 4, 5)}
    assert_pruned(source, tmp_path / "out.gguf", kept, 8)
    assert any("keeps the first experts" in note for note in result.notes)


def test_tables_of_experts_are_renumbered(tmp_path: Path) -> None:
    source = write_hashed(tmp_path / "m.gguf")
    kept = (0, 2, 3, 7)
    pruned(source, tmp_path / "out.gguf", kept)
    assert_pruned(source, tmp_path / "out.gguf", kept_of(3, kept), 8)
    table = read(tmp_path / "out.gguf")[1]["blk.0.ffn_gate_tid2eid.weight"].data
    values = [int.from_bytes(table[i : i + 4], "little") for i in range(0, len(table), 4)]
    assert set(values) == {0, 1, 2, 3}
    assert all(len(set(values[i : i + 3])) == 3 for i in range(0, 150, 3))


@pytest.mark.parametrize("alignment", [16, 32, 4096])
def test_the_alignment_of_the_source_stays(tmp_path: Path, alignment: int) -> None:
    model = TinyMoe(keys={"general.alignment": ("u32", alignment)})
    source = write(tmp_path / "m.gguf", model.entries(), model.tensors(), alignment)
    pruned(source, tmp_path / "out.gguf", ODD)
    assert_pruned(source, tmp_path / "out.gguf", kept_of(3, ODD), 8)


# --- split sets


@pytest.mark.parametrize("files", [2, 5])
def test_split_input_becomes_one_file(tmp_path: Path, files: int) -> None:
    model = TinyMoe()
    source = write_split(tmp_path, "m", model.entries(), model.tensors(), files)
    pruned(source, tmp_path / "out.gguf", HALF)
    assert_pruned(source, tmp_path / "out.gguf", kept_of(3, HALF), 8)
    entries, _ = read(tmp_path / "out.gguf")
    assert not [key for key in entries if key.startswith("split.")]


def test_split_input_gives_the_same_file_as_a_whole_one(tmp_path: Path) -> None:
    model = TinyMoe()
    (tmp_path / "split").mkdir()
    whole = model.write(tmp_path / "m.gguf")
    parts = write_split(tmp_path / "split", "m", model.entries(), model.tensors(), 3)
    pruned(whole, tmp_path / "one.gguf", ODD)
    pruned(parts, tmp_path / "other.gguf", ODD)
    one, other = read(tmp_path / "one.gguf"), read(tmp_path / "other.gguf")
    assert one[1] == other[1]
    assert unsplit(one[0]) == unsplit(other[0])


@pytest.mark.parametrize("split", [False, True])
def test_split_output(tmp_path: Path, split: bool) -> None:
    model = DEEPSEEK
    source = (
        write_split(tmp_path, "m", model.entries(), model.tensors(), 4)
        if split
        else model.write(tmp_path / "m.gguf")
    )
    result = pruned(source, tmp_path / "out.gguf", (0, 2, 4, 7), mtp="drop", max_shard_size=20_000)
    assert result.out.name.startswith("out-00001-of-0000")
    count = len(list(tmp_path.glob("out-*.gguf")))
    assert count > 2
    assert not (tmp_path / "out.gguf").exists()
    for file in tmp_path.glob("out-*.gguf"):
        tensors = read(file)[1].values()
        assert len(tensors) == 1 or sum(len(t.data) for t in tensors) <= 20_000
    assert_pruned(source, result.out, kept_of(4, (0, 2, 4, 7)), 8, dropped=[3])
    entries, _ = read_set(result.out)
    assert entries["split.count"].raw[-2:] == count.to_bytes(2, "little")


def test_a_set_with_another_alignment_is_read_back(tmp_path: Path) -> None:
    model = TinyMoe(keys={"general.alignment": ("u32", 256)})
    source = write(tmp_path / "m.gguf", model.entries(), model.tensors(), 256)
    result = pruned(source, tmp_path / "out.gguf", HALF, max_shard_size=20_000)
    assert inspect(result.out).experts == 4


def test_output_named_as_a_set_keeps_the_prefix(tmp_path: Path) -> None:
    source = TinyMoe().write(tmp_path / "m.gguf")
    result = pruned(source, tmp_path / "o-00001-of-00009.gguf", HALF, max_shard_size=20_000)
    assert result.out.name.startswith("o-00001-of-0000")
    assert len(list(tmp_path.glob("o-*.gguf"))) == int(result.out.name[-6])


# --- properties


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_plan(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("plan")
    experts, blocks = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 3))
    kinds = st.sampled_from(["Q8_0", "MXFP4", "Q4_0_R8", "F16", "IQ1_S_R4"])
    model = TinyMoe(
        experts=experts,
        blocks=blocks,
        top_k=1,
        width=32,
        expert_type=data.draw(kinds),
        biases=data.draw(st.booleans()),
        fused=data.draw(st.booleans()),
    )
    kept = data.draw(st.integers(1, experts))
    permutations = st.permutations(range(experts)).map(lambda order: tuple(order[:kept]))
    each = [data.draw(permutations) for _ in range(blocks)]
    seed = data.draw(st.integers(0, 99))
    if data.draw(st.booleans()):
        source = write_split(folder, "m", model.entries(), model.tensors(seed), 2)
    else:
        source = model.write(folder / "m.gguf", seed)
    size = data.draw(st.none() | st.integers(1, 20_000))
    result = pruned(source, folder / "out.gguf", *each, max_shard_size=size)
    assert_pruned(source, result.out, dict(enumerate(each)), experts)


def test_the_slicer_of_these_tests_takes_whole_rows() -> None:
    """A check of the oracle: its pieces begin at rows of the type."""
    rng = random.Random(0)
    for kind, (_, block, _, _) in TYPES.items():
        ne = (block * 2, 16, rng.randrange(1, 5))
        assert nbytes(kind, ne) == nbytes(kind, ne[:2]) * ne[2]
