"""The metadata of a pruned GGUF file: a few keys change, all others are the source's bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moe_surgery import prune
from moe_surgery.checkpoint.gguf.model_file import GgufModel
from moe_surgery.checkpoint.local_file import LocalFolder
from moe_surgery.errors import PlanMismatchError
from moe_surgery.surgery.verify import verify_checkpoint
from moe_surgery.version import __version__
from tests.support.raw_gguf import Entry, TinyMoe, entry, read, write

from .models import DEEPSEEK, HASHED, pruned, rows, unsplit

HALF = (1, 2, 5, 7)


def changed(source: Path, out: Path) -> tuple[dict[str, Entry], list[str], list[str]]:
    """Keys whose bytes differ, those that are gone, and those that are new, without our own; order is checked."""
    before, after = read(source)[0], unsplit(read(out)[0])
    stay = [key for key in before if key in after]
    assert [key for key in after if key in before] == stay
    differ = {key: after[key] for key in stay if after[key] != before[key]}
    return differ, [k for k in before if k not in after], [k for k in after if k not in before]


def test_only_the_count_and_the_label_change(tmp_path: Path) -> None:
    source = TinyMoe().write(tmp_path / "m.gguf")
    pruned(source, tmp_path / "out.gguf", HALF)
    differ, gone, new = changed(source, tmp_path / "out.gguf")
    assert differ == {
        "qwen3moe.expert_count": entry("qwen3moe.expert_count", "u32", 4),
        "general.size_label": entry("general.size_label", "str", "4x7B"),
    }
    assert (gone, new) == ([], [])


@pytest.mark.parametrize("label", ["30B-A3B", "16x7B", "large"])
def test_a_label_that_does_not_count_these_experts_is_dropped(tmp_path: Path, label: str) -> None:
    source = TinyMoe(keys={"general.size_label": ("str", label)}).write(tmp_path / "m.gguf")
    pruned(source, tmp_path / "out.gguf", HALF)
    differ, gone, _ = changed(source, tmp_path / "out.gguf")
    assert list(differ) == ["qwen3moe.expert_count"]
    assert gone == ["general.size_label"]


@pytest.mark.parametrize(
    "model", [TinyMoe(), DEEPSEEK, HASHED, TinyMoe("llama4", experts=128, top_k=1, blocks=1)]
)
def test_keeping_all_gives_the_same_tensors_and_keys(tmp_path: Path, model: TinyMoe) -> None:
    source = model.write(tmp_path / "m.gguf")
    pruned(source, tmp_path / "out.gguf", range(model.experts))
    before, after = read(source), read(tmp_path / "out.gguf")
    assert before[1] == after[1]
    assert list(before[1]) == list(after[1])
    assert before[0] == unsplit(after[0])


def test_fewer_experts_than_the_top_k_lower_it_and_state_the_width(tmp_path: Path) -> None:
    source = TinyMoe().write(tmp_path / "m.gguf")
    result = pruned(source, tmp_path / "out.gguf", [3])
    differ, _, new = changed(source, tmp_path / "out.gguf")
    assert differ["qwen3moe.expert_used_count"] == entry("qwen3moe.expert_used_count", "u32", 1)
    assert new == ["qwen3moe.expert_feed_forward_length"]
    assert read(tmp_path / "out.gguf")[0][new[0]] == entry(new[0], "u32", 64)
    assert any(note.startswith("top-k is 1 instead of the source's 2") for note in result.notes)


@pytest.mark.parametrize(("top_k", "kept"), [(3, HALF), (1, HALF), (4, HALF)])
def test_another_top_k(tmp_path: Path, top_k: int, kept: tuple[int, ...]) -> None:
    source = TinyMoe().write(tmp_path / "m.gguf")
    prune(source, tmp_path / "out.gguf", rows(kept), top_k=top_k)
    differ, _, new = changed(source, tmp_path / "out.gguf")
    assert differ["qwen3moe.expert_used_count"] == entry("qwen3moe.expert_used_count", "u32", top_k)
    assert new == ["qwen3moe.expert_feed_forward_length"]


def test_the_width_is_not_stated_where_it_is_known_or_does_not_depend_on_the_top_k(tmp_path: Path) -> None:
    known = TinyMoe(keys={"qwen3moe.expert_feed_forward_length": ("u32", 64)})
    for number, model in enumerate((known, TinyMoe("gpt-oss"))):
        source = model.write(tmp_path / f"{number}.gguf")
        pruned(source, tmp_path / f"out{number}.gguf", [3])
        assert changed(source, tmp_path / f"out{number}.gguf")[2] == []


def test_widths_that_differ_between_blocks(tmp_path: Path) -> None:
    model = TinyMoe()
    wide = {t.name: t for t in replace(model, width=128).tensors()}
    tensors = [wide[t.name] if t.name.startswith("blk.2.ffn") else t for t in model.tensors()]
    source = write(tmp_path / "m.gguf", model.entries(), tensors)
    pruned(source, tmp_path / "out.gguf", HALF)
    with pytest.raises(PlanMismatchError, match="experts have 2 widths"):
        pruned(source, tmp_path / "other.gguf", [0])


def nemotron(*used: int) -> TinyMoe:
    key = "nemotron_h_moe.expert_used_count"
    return TinyMoe("nemotron_h_moe", keys={key: ("[u32]", list(used))}, dense=1)


@pytest.mark.parametrize(
    ("kept", "top_k", "expected"), [(2, None, [0, 2, 2]), (4, 3, [0, 3, 3]), (4, None, [0, 2, 3])]
)
def test_a_top_k_of_each_block(tmp_path: Path, kept: int, top_k: int | None, expected: list[int]) -> None:
    source = nemotron(0, 2, 3).write(tmp_path / "m.gguf")
    prune(source, tmp_path / "out.gguf", rows(range(kept)), top_k=top_k)
    key = "nemotron_h_moe.expert_used_count"
    assert read(tmp_path / "out.gguf")[0][key] == entry(key, "[u32]", expected)


def test_dropped_mtp_blocks_are_no_longer_counted(tmp_path: Path) -> None:
    source = DEEPSEEK.write(tmp_path / "m.gguf")
    pruned(source, tmp_path / "out.gguf", range(8), mtp="drop")
    differ, gone, new = changed(source, tmp_path / "out.gguf")
    assert differ == {
        "deepseek2.block_count": entry("deepseek2.block_count", "u32", 3),
        "deepseek2.nextn_predict_layers": entry("deepseek2.nextn_predict_layers", "u32", 0),
        "deepseek2.attention.head_count_kv": entry("deepseek2.attention.head_count_kv", "[u32]", [1, 2, 3]),
    }
    assert (gone, new) == ([], [])


def test_dropped_mtp_blocks_leave_lists_that_are_edited_too(tmp_path: Path) -> None:
    keys = {
        "nemotron_h_moe.expert_used_count": ("[u32]", [0, 2, 3, 2]),
        "nemotron_h_moe.rope.dimension_sections": ("[i32]", [1, 1, 1, 0]),
    }
    source = TinyMoe("nemotron_h_moe", keys=keys, dense=1, blocks=4, mtp=1).write(tmp_path / "m.gguf")
    prune(source, tmp_path / "out.gguf", rows((0, 5)), mtp="drop")
    after = read(tmp_path / "out.gguf")[0]
    used, sections = keys
    assert after[used] == entry(used, "[u32]", [0, 2, 2])
    assert after[sections] == entry(sections, *keys[sections])
    assert verify_checkpoint(tmp_path / "out.gguf", source=source).ok
    prune(source, tmp_path / "same.gguf", rows((0, 5, 6)), mtp="drop")
    assert read(tmp_path / "same.gguf")[0][used] == entry(used, "[u32]", [0, 2, 3])


def test_provenance(tmp_path: Path) -> None:
    source = TinyMoe(blocks=2).write(tmp_path / "Tiny-Q8_0.gguf")
    pruned(source, tmp_path / "out.gguf", HALF, (4, 3, 2, 1))
    own = {k: e for k, e in read(tmp_path / "out.gguf")[0].items() if k.startswith("moe_surgery.")}
    digest = own.pop("moe_surgery.source.digest")
    assert len(digest.raw) == 4 + 8 + 32
    expected = [
        entry("moe_surgery.version", "str", __version__),
        entry("moe_surgery.source.name", "str", "Tiny-Q8_0.gguf"),
        entry("moe_surgery.source.expert_count", "u32", 8),
        entry("moe_surgery.blocks", "[u32]", [0, 1]),
        entry("moe_surgery.kept_experts", "[u32]", [*HALF, 4, 3, 2, 1]),
    ]
    assert list(own.values()) == expected


def test_pruning_again_replaces_the_provenance(tmp_path: Path) -> None:
    source = TinyMoe().write(tmp_path / "m.gguf")
    pruned(source, tmp_path / "half.gguf", HALF)
    pruned(tmp_path / "half.gguf", tmp_path / "quarter.gguf", [0, 3])
    pruned(source, tmp_path / "at-once.gguf", [1, 7])
    twice, once = read(tmp_path / "quarter.gguf"), read(tmp_path / "at-once.gguf")
    assert twice[1] == once[1]
    assert unsplit(twice[0]) == unsplit(once[0])
    assert twice[0]["moe_surgery.source.expert_count"] == entry("moe_surgery.source.expert_count", "u32", 4)


def test_the_digest_of_the_source_depends_on_its_weights_and_structure(tmp_path: Path) -> None:
    digests = set()
    for number, (model, seed) in enumerate([(TinyMoe(), 0), (TinyMoe(), 1), (TinyMoe(expert_type="F16"), 0)]):
        source = model.write(tmp_path / f"{number}.gguf", seed)
        pruned(source, tmp_path / f"out{number}.gguf", HALF)
        digests.add(read(tmp_path / f"out{number}.gguf")[0]["moe_surgery.source.digest"].raw)
    assert len(digests) == 3


def test_data_begin_where_llama_cpp_takes_them(tmp_path: Path) -> None:
    """llama.cpp aborts where tensor data do not begin at a multiple of 32, whatever the alignment of the file."""
    starts = set()
    for extra in range(0, 33, 8):
        model = TinyMoe(keys={"general.alignment": ("u32", 16), "general.name": ("str", "n" * extra)})
        source = write(tmp_path / f"{extra}.gguf", model.entries(), model.tensors(), alignment=16)
        out = tmp_path / f"out-{extra}.gguf"
        pruned(source, out, HALF)
        with GgufModel.open(LocalFolder(tmp_path), out.name) as opened:
            start = next(iter(opened.shards.values())).header.data_start
            assert opened.alignment == 16
        assert start % 32 == 0
        starts.add(start)
        assert verify_checkpoint(out, source=source).ok
    assert len(starts) > 1
