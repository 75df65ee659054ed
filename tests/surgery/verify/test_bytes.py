"""One flipped byte anywhere is reported by file and tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import xxhash

from moe_surgery.errors import InvalidInputError, VerificationError
from moe_surgery.surgery.manifest import load_manifest
from moe_surgery.surgery.verify import verify_checkpoint
from tests.support.checkpoints import INDEX, load_tensors
from tests.support.command import contents, untouched
from tests.surgery.verify.damage import (
    FLIPS,
    check_found,
    damaged,
    flip,
    header_offsets,
    problems,
    tensor_offsets,
)

Capture = pytest.CaptureFixture[str]


def test_sound_checkpoint_has_no_problem(job: tuple[Path, Path]) -> None:
    source, out = job
    with untouched(source, out):
        for against in (None, source):
            result = verify_checkpoint(out, source=against)
            assert result.ok
            assert result.notes == ()
            assert result.tensors == len(load_tensors(out))
            assert result.files == len(os.listdir(out)) - 1  # the manifest itself
            assert result.bytes_read >= sum(f.stat().st_size for f in out.iterdir()) - 50_000


def test_flipped_byte_in_a_header_is_found(out: Path) -> None:
    for place, shard in enumerate(sorted(out.glob("*.safetensors"))[:3]):
        for number, offset in enumerate(header_offsets(shard)):
            if number % 3 != place:  # a third of the offsets in each: verifying takes a while
                continue
            mask = FLIPS[number % len(FLIPS)]
            flip(shard, offset, mask)
            check_found(out, shard.name)
            flip(shard, offset, mask)
    assert problems(out) == ()


@pytest.mark.parametrize("place", [0, 1, 2], ids=["first", "middle", "last"])
def test_flipped_byte_in_every_tensor_names_every_tensor(out: Path, place: int) -> None:
    expected = []
    for shard in sorted(out.glob("*.safetensors")):
        for number, (tensor, offsets) in enumerate(tensor_offsets(shard)):
            flip(shard, offsets[place], FLIPS[number % len(FLIPS)])
            expected.append(damaged(shard, tensor))
    assert sorted(problems(out)) == sorted(expected)


def test_flipped_byte_in_one_tensor_names_no_other(out: Path) -> None:
    for shard in sorted(out.glob("*.safetensors")):
        for number, (tensor, offsets) in enumerate(tensor_offsets(shard)):
            if number % 4 == 0:
                flip(shard, offsets[number // 4 % 3], 1)
                assert problems(out) == (damaged(shard, tensor),)
                flip(shard, offsets[number // 4 % 3], 1)


def test_flipped_byte_in_any_other_file_is_found(out: Path) -> None:
    small = [f for f in sorted(out.iterdir()) if f.suffix != ".safetensors"]
    assert {f.name for f in small} == {
        "README.md",
        "README.source.md",
        "chat_template.jinja",
        "config.json",
        "expert_mapping.json",
        "generation_config.json",
        INDEX,
        "surgery.json",
    }
    for file in small:
        size = file.stat().st_size
        for number, offset in enumerate({*range(0, size, max(1, size // 5)), size - 1}):
            mask = FLIPS[number % len(FLIPS)]
            flip(file, offset, mask)
            check_found(out, file.name)
            flip(file, offset, mask)
    assert problems(out) == ()


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_flipped_byte_anywhere_in_the_manifest_is_found(out: Path, step: int) -> None:
    manifest = out / "surgery.json"
    for offset in range(0, manifest.stat().st_size, step):
        mask = FLIPS[offset % len(FLIPS)]
        flip(manifest, offset, mask)
        with pytest.raises((InvalidInputError, VerificationError)) as caught:
            load_manifest(manifest)
        assert str(manifest) in str(caught.value)
        flip(manifest, offset, mask)
    load_manifest(manifest)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw + b" ",
        lambda raw: raw + b"\n",
        lambda raw: raw[:-1],
        lambda raw: raw.replace(b"\n", b"\r\n"),
        lambda raw: raw.replace(b'": ', b'":  ', 1),
        lambda raw: json.dumps(json.loads(raw)).encode(),
        lambda raw: raw.replace(b'"digest": "', b'"digest": "0', 1),
        lambda raw: raw.replace(raw[13:45], b"0" * 32, 1),
        lambda raw: raw.replace(raw[13:45], raw[13:45].upper(), 1),
        lambda raw: raw.replace(b'"digest"', b'"digesT"', 1),
    ],
)
def test_rewritten_manifest_is_found(out: Path, change: Callable[[bytes], bytes]) -> None:
    manifest = out / "surgery.json"
    raw = manifest.read_bytes()
    manifest.write_bytes(change(raw))
    assert manifest.read_bytes() != raw
    check_found(out, "surgery.json")


# --- an independent reader


def test_manifest_holds_what_an_independent_reader_finds(out: Path) -> None:
    manifest = json.loads((out / "surgery.json").read_bytes())
    seen = {"surgery.json"}
    for name, record in manifest["files"].items():
        raw = (out / name).read_bytes()
        assert record["size"] == len(raw)
        assert record["xxh3_128"] == xxhash.xxh3_128_hexdigest(raw)
        seen.add(name)
        if name.endswith(".safetensors"):
            entries = dict(safetensors.deserialize(raw))  # type: ignore[no-untyped-call]
            assert entries.keys() == record["tensors"].keys()
            for tensor, entry in entries.items():
                output = record["tensors"][tensor]
                assert output["dtype"] == entry["dtype"]
                assert output["shape"] == entry["shape"]
                assert output["xxh3_128"] == xxhash.xxh3_128_hexdigest(bytes(entry["data"]))
        else:
            assert record["tensors"] == {}
    assert seen == set(contents(out))
    blank = (out / "surgery.json").read_bytes().replace(manifest["digest"].encode(), b"0" * 32, 1)
    assert xxhash.xxh3_128_hexdigest(blank) == manifest["digest"]
