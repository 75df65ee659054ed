"""Verification of pruned GGUF files: by structure, by manifest, against the source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moe_surgery import prune
from moe_surgery.errors import InvalidInputError, PlanMismatchError
from moe_surgery.surgery.verify import verify_checkpoint
from tests.support.raw_gguf import Entry, Tensor, TinyMoe, entry, read, write, write_split

from .models import DEEPSEEK, GPT_OSS, pruned, rows, write_hashed

HALF = (1, 2, 5, 7)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return TinyMoe().write(tmp_path / "m.gguf")


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    return pruned(source, tmp_path / "out.gguf", HALF, (0, 1, 2, 3), (7, 6, 5, 4), manifest=True).out


def rewritten(path: Path, *, keys: list[Entry] | None = None, tensors: list[Tensor] | None = None) -> Path:
    """The file with other keys or tensors, without its manifest."""
    old_keys, old = read(path)
    new = path.with_name("changed.gguf")
    return write(new, keys or list(old_keys.values()), tensors or list(old.values()))


def problems(path: Path, source: Path | None = None) -> tuple[str, ...]:
    result = verify_checkpoint(path, source=source)
    assert result.ok == (not result.problems)
    assert all("\n" not in line for line in result.problems)
    return result.problems


def flip(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


def test_a_sound_file(source: Path, out: Path) -> None:
    result = verify_checkpoint(out, source=source)
    assert (result.problems, result.notes) == ((), ())
    assert (result.files, result.tensors) == (1, 27)
    assert result.bytes_read == 2 * out.stat().st_size


def test_without_manifest_and_source_the_weights_are_said_not_to_be_checked(
    source: Path, tmp_path: Path
) -> None:
    out = pruned(source, tmp_path / "plain.gguf", HALF).out
    result = verify_checkpoint(out)
    assert result.ok
    assert "its weights were not: there is no plain.gguf.surgery.json" in result.notes[0]
    flip(out, out.stat().st_size // 2)
    assert verify_checkpoint(out).ok
    assert verify_checkpoint(out, structure_only=True).notes[0].endswith("its weights were not")


@pytest.mark.parametrize("where", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("against", ["manifest", "source"])
def test_a_flipped_byte_names_the_tensor(source: Path, out: Path, where: float, against: str) -> None:
    if against == "source":
        out.with_name("out.gguf.surgery.json").unlink()
    flip(out, int(out.stat().st_size * where))
    found = problems(out, source if against == "source" else None)
    assert len(found) == 1
    assert "tensor '" in found[0]
    assert ("differs from the kept experts" if against == "source" else "its digest") in found[0]


def test_changed_metadata_is_found_by_the_manifest(out: Path) -> None:
    raw = out.read_bytes()
    out.write_bytes(raw.replace(b"Tiny MoE", b"Tidy MoE"))
    (found,) = problems(out)
    assert "its metadata or tensor table was modified" in found


@pytest.mark.parametrize(
    ("key", "new", "words"),
    [
        ("general.name", entry("general.name", "str", "Other"), "key 'general.name' differs"),
        ("tokenizer.ggml.tokens", None, "key 'tokenizer.ggml.tokens' is missing"),
        (
            "qwen3moe.block_count",
            entry("qwen3moe.block_count", "u32", 4),
            "key 'qwen3moe.block_count' differs",
        ),
    ],
)
def test_changed_keys_are_found_by_the_source(
    source: Path, out: Path, key: str, new: Entry | None, words: str
) -> None:
    keys = [new if k == key else e for k, e in read(out)[0].items() if k != key or new is not None]
    (found,) = problems(rewritten(out, keys=[k for k in keys if k is not None]), source)
    assert words in found


def test_an_added_key_is_found(source: Path, out: Path) -> None:
    keys = [*read(out)[0].values(), entry("qwen3moe.extra", "u32", 1)]
    (found,) = problems(rewritten(out, keys=keys), source)
    assert "key 'qwen3moe.extra' is not in the source" in found


def test_other_experts_than_the_keys_say(source: Path, out: Path) -> None:
    keys, tensors = read(out)
    listed = keys["moe_surgery.kept_experts"]
    swapped = listed.raw[:16] + listed.raw[20:24] + listed.raw[16:20] + listed.raw[24:]
    changed = [Entry(k, swapped) if e is listed else e for k, e in keys.items()]
    found = problems(rewritten(out, keys=changed), source)
    assert found
    assert all("tensor 'blk.0.ffn_" in line for line in found)
    short = entry("moe_surgery.kept_experts", "[u32]", [0, 1] * 3)
    (one,) = problems(rewritten(out, keys=[short if k == short.key else e for k, e in keys.items()]))
    assert "lists other experts than the 4" in one
    twice = entry("moe_surgery.kept_experts", "[u32]", [0] * 12)
    (one,) = problems(rewritten(out, keys=[twice if k == twice.key else e for k, e in keys.items()]))
    assert "does not list distinct experts" in one
    del tensors


def test_a_tensor_of_another_type(source: Path, out: Path) -> None:
    tensors = [
        Tensor(t.name, "F32", t.ne, bytes(4 * t.ne[0] * t.ne[1])) if t.name == "output.weight" else t
        for t in read(out)[1].values()
    ]
    (found,) = problems(rewritten(out, tensors=tensors), source)
    assert "tensor 'output.weight': is F32 [5, 32], expected Q8_0 [5, 32]" in found


def test_another_source(out: Path, tmp_path: Path) -> None:
    other = GPT_OSS.write(tmp_path / "other.gguf")
    with pytest.raises(PlanMismatchError, match="not the source of"):
        verify_checkpoint(out, source=other)
    retrained = TinyMoe().write(tmp_path / "retrained.gguf", seed=5)
    assert len(problems(out, retrained)) > 20


def test_an_inconsistent_file(source: Path, out: Path) -> None:
    keys = [
        entry("qwen3moe.expert_count", "u32", 5) if k == "qwen3moe.expert_count" else e
        for k, e in read(out)[0].items()
    ]
    (found,) = problems(rewritten(out, keys=keys), source)
    assert "has 4 entries on its outermost axis" in found


def test_a_file_cut_off(out: Path) -> None:
    out.write_bytes(out.read_bytes()[:-100])
    with pytest.raises(InvalidInputError, match="cut off"):
        verify_checkpoint(out)


@pytest.mark.parametrize("mtp", ["keep", "drop"])
def test_sets_groups_and_mtp_blocks(tmp_path: Path, mtp: str) -> None:
    source = write_split(tmp_path, "m", DEEPSEEK.entries(), DEEPSEEK.tensors(), 3)
    result = pruned(
        source, tmp_path / "out.gguf", (0, 2, 4, 7), mtp=mtp, max_shard_size=20_000, manifest=True
    )
    assert problems(result.out, source) == ()
    second = result.out.with_name(result.out.name.replace("-00001-", "-00002-"))
    flip(second, second.stat().st_size - 1)
    found = problems(result.out)
    assert len(found) == 1
    assert second.name in found[0]


def test_a_set_merged_afterwards_is_still_compared_with_the_source(tmp_path: Path) -> None:
    source = TinyMoe().write(tmp_path / "m.gguf")
    result = pruned(source, tmp_path / "out.gguf", HALF, max_shard_size=20_000)
    keys, tensors = read(result.out)
    for path in sorted(tmp_path.glob("out-*"))[1:]:
        tensors |= read(path)[1]
    merged = write(
        tmp_path / "merged.gguf",
        [e for k, e in keys.items() if not k.startswith("split.")],
        reversed(tensors.values()),
    )
    assert problems(merged, source) == ()


@pytest.mark.parametrize("top_k", [None, 3, 1])
def test_another_top_k(tmp_path: Path, source: Path, top_k: int | None) -> None:
    prune(source, tmp_path / "out.gguf", rows(HALF), top_k=top_k)
    assert problems(tmp_path / "out.gguf", source) == ()


def test_tables(tmp_path: Path) -> None:
    source = write_hashed(tmp_path / "m.gguf")
    pruned(source, tmp_path / "out.gguf", HALF)
    assert problems(tmp_path / "out.gguf", source) == ()


def test_a_file_that_was_never_pruned_is_compared_as_a_whole(tmp_path: Path, source: Path) -> None:
    copy = tmp_path / "copy.gguf"
    shutil.copy(source, copy)
    result = verify_checkpoint(copy, source=source)
    assert result.ok
    assert "was not pruned by moe-surgery" in result.notes[0]
    flip(copy, copy.stat().st_size // 2)
    assert problems(copy, source)


def test_the_manifest(source: Path, out: Path) -> None:
    manifest = json.loads(out.with_name("out.gguf.surgery.json").read_text())
    assert manifest["source"]["name"] == "m.gguf"
    assert manifest["plan"]["layers"][0] == list(HALF)
    assert set(manifest["files"]) == {"out.gguf"}
    assert str(source.parent) not in json.dumps(manifest)


def test_a_missing_file_of_the_manifest(out: Path) -> None:
    moved = out.rename(out.with_name("renamed.gguf"))
    out.with_name("out.gguf.surgery.json").rename(out.with_name("renamed.gguf.surgery.json"))
    assert any("out.gguf: missing, but listed" in line for line in problems(moved))
