"""One flipped byte anywhere is found, and named by file and tensor."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors
import xxhash

from moe_surgery.checkpoint.header import Header, read_header
from moe_surgery.checkpoint.local_file import LocalFile
from moe_surgery.errors import InvalidInputError, PlanMismatchError, VerificationError
from moe_surgery.pipeline import prune
from moe_surgery.selection.plan import plan_keeping
from moe_surgery.surgery.manifest import load_manifest
from moe_surgery.surgery.verify import verify_checkpoint

from ..support.checkpoints import INDEX, Shape, load_tensors, write_checkpoint
from ..support.command import call, contents, untouched

Capture = pytest.CaptureFixture[str]
FLIPS = (0x01, 0x20, 0x80)


@pytest.fixture(scope="module", params=["keep", "bf16", "mxfp4"])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and a pruned checkpoint of some shards."""
    folder = tmp_path_factory.mktemp("job")
    layout = "bf16" if request.param == "mxfp4" else "mxfp4"
    source = write_checkpoint(folder / "source", layout=layout, shards=2)
    pruned(source, folder / "out", request.param)
    return source, folder / "out"


@pytest.fixture
def source(job: tuple[Path, Path]) -> Path:
    return job[0]


@pytest.fixture
def out(job: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(job[1], tmp_path / "out")
    return tmp_path / "out"


def pruned(source: Path, out: Path, dtype: str = "keep") -> None:
    prune(source, out, lambda m: plan_keeping([0, 1, 3], m), store=dtype, max_shard_size=25_000)


def problems(out: Path) -> tuple[str, ...]:
    return verify_checkpoint(out).problems


def flip(path: Path, offset: int, mask: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def header_of(shard: Path) -> Header:
    with LocalFile(shard) as file:
        return read_header(file)


def header_offsets(shard: Path) -> Iterator[int]:
    """Offsets in the length, in the JSON and in the padding of a shard's header."""
    start = header_of(shard).data_start
    end = len(shard.read_bytes()[:start].rstrip(b" "))
    assert end < start - 1
    yield from range(8)
    yield from range(8, end, max(1, (end - 8) // 30))
    yield from (end - 1, end, start - 1)


def tensor_offsets(shard: Path) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """The first, a middle and the last byte of every tensor."""
    header = header_of(shard)
    for t in header.tensors.values():
        begin, end = header.data_start + t.begin, header.data_start + t.end
        yield t.name, (begin, (begin + end) // 2, end - 1)


def damaged(shard: Path, tensor: str) -> str:
    return f"{shard}: tensor '{tensor}': its bytes do not have the manifest's digest"


def check_found(out: Path, file: str) -> None:
    found = problems(out)
    assert any(f"{out / file}: " in problem for problem in found), found


# --- one byte


def test_sound_checkpoint_has_no_problem(job: tuple[Path, Path]) -> None:
    source, out = job
    with untouched(source, out):
        for against in (None, source):
            found = verify_checkpoint(out, source=against)
            assert found.ok
            assert found.notes == ()
            assert found.tensors == len(load_tensors(out))
            assert found.files == len(os.listdir(out)) - 1  # the manifest itself
            assert found.bytes_read >= sum(f.stat().st_size for f in out.iterdir()) - 50_000


def test_flipped_byte_in_a_header_is_found(out: Path) -> None:
    for shard in sorted(out.glob("*.safetensors"))[:3]:
        for number, offset in enumerate(header_offsets(shard)):
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
        for number, offset in enumerate({*range(0, size, max(1, size // 12)), size - 1}):
            mask = FLIPS[number % len(FLIPS)]
            flip(file, offset, mask)
            check_found(out, file.name)
            flip(file, offset, mask)
    assert problems(out) == ()


def test_flipped_byte_anywhere_in_the_manifest_is_found(out: Path) -> None:
    manifest = out / "surgery.json"
    for offset in range(manifest.stat().st_size):
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


# --- whole files


@pytest.mark.parametrize("size", [-1, 1, 100, None])
def test_file_of_another_length_is_named(job: tuple[Path, Path], tmp_path: Path, size: int | None) -> None:
    for name in os.listdir(job[1]):
        out = tmp_path / name / "out"
        shutil.copytree(job[1], out)
        old = (out / name).stat().st_size
        os.truncate(out / name, 0 if size is None else old + size)
        check_found(out, name)
        if name != "surgery.json":
            assert any(f"{out / name}: " in p and f"expected {old}" in p for p in problems(out))


def test_missing_file_is_named(job: tuple[Path, Path], tmp_path: Path) -> None:
    for name in set(os.listdir(job[1])) - {"surgery.json"}:
        out = tmp_path / name / "out"
        shutil.copytree(job[1], out)
        (out / name).unlink()
        check_found(out, name)


def test_swapped_shards_are_found(out: Path) -> None:
    one, other = sorted(out.glob("*.safetensors"))[:2]
    one.rename(out / "aside")
    other.rename(one)
    (out / "aside").rename(other)
    found = problems(out)
    assert any(one.name in p for p in found)
    assert any(other.name in p for p in found)


@pytest.mark.parametrize("name", ["extra.safetensors", "model-00009-of-00009.safetensors"])
def test_extra_weights_are_a_problem(out: Path, name: str) -> None:
    shutil.copy(next(out.glob("*.safetensors")), out / name)
    check_found(out, name)


def test_extra_file_is_a_note(out: Path) -> None:
    (out / "notes.txt").write_text("mine")
    found = verify_checkpoint(out)
    assert found.ok
    assert found.notes == (f"{out / 'notes.txt'}: not listed in surgery.json",)


SIDE_EDITS: dict[str, Callable[[Path], object]] = {
    "README.md": lambda path: path.write_text("# Mine\n"),
    "README.source.md": lambda path: path.unlink(),
    "chat_template.jinja": lambda path: flip(path, 0, 1),
    "config.json": lambda path: path.write_text(path.read_text().replace("\n", "\r\n")),
    "generation_config.json": lambda path: path.write_text("{}"),
}


@pytest.mark.parametrize("against", [False, True], ids=["alone", "with source"])
@pytest.mark.parametrize("name", SIDE_EDITS)
def test_an_edited_side_file_is_named_apart_from_weights(
    name: str, against: bool, source: Path, out: Path, capsys: Capture
) -> None:
    SIDE_EDITS[name](out / name)
    options = ["--source", source] if against else []
    ended = call(capsys, "verify", out, *options)
    assert (ended.code, ended.out) == (8, "")
    named, summary = ended.err.splitlines()
    assert named.startswith(f"moe-surgery: {out / name}: ")
    assert summary == (
        f"moe-surgery: {out}: the weights are sound, only {name} changed; --weights-only accepts that"
    )
    ended = call(capsys, "verify", out, "--weights-only", *options)
    assert ended.code == 0
    assert ended.out.startswith(f"{out}: sound (")
    assert ended.err.splitlines() == [named.replace("moe-surgery: ", "note: ", 1)]
    said = call(capsys, "verify", out, "--weights-only", "--json", *options).json()
    assert (said["ok"], said["problems"], said["side_files"], said["weights_ok"]) == (True, [], [name], True)


def test_weights_only_still_finds_one_byte_in_every_tensor(out: Path, capsys: Capture) -> None:
    (out / "README.md").write_text("# Mine\n")
    for shard in sorted(out.glob("*.safetensors")):
        for tensor, offsets in tensor_offsets(shard):
            flip(shard, offsets[1], 1)
            found = verify_checkpoint(out, weights_only=True)
            assert (found.problems, found.weights_ok) == ((damaged(shard, tensor),), False)
            flip(shard, offsets[1], 1)
    shard = next(out.glob("*.safetensors"))
    flip(shard, shard.stat().st_size - 1, 1)
    ended = call(capsys, "verify", out, "--weights-only")
    assert ended.code == 8
    assert "the weights are sound" not in ended.err


def test_weights_only_still_holds_config_and_index_against_the_shards(out: Path) -> None:
    config = json.loads((out / "config.json").read_bytes())
    (out / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    assert not verify_checkpoint(out, weights_only=True).ok
    (out / "config.json").write_text(json.dumps(config))
    assert verify_checkpoint(out, weights_only=True).ok
    index = json.loads((out / INDEX).read_bytes())
    index["weight_map"].popitem()
    (out / INDEX).write_text(json.dumps(index))
    assert not verify_checkpoint(out, weights_only=True).ok


def test_what_git_and_the_hub_add_is_one_note(out: Path, capsys: Capture) -> None:
    (out / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    for folder in (".git", ".cache"):
        (out / folder).mkdir()
        (out / folder / "model.safetensors").write_text("x")
    for options in ([], ["--weights-only"], ["--structure-only"]):
        ended = call(capsys, "verify", out, *options)
        assert ended.code == 0
        assert ended.err.splitlines() == [
            f"note: {out}: .cache, .git, .gitattributes: hidden, not part of the checkpoint"
        ]


@pytest.mark.parametrize("kind", ["fifo", "folder", "dangling link"])
def test_shard_that_is_no_regular_file_is_named(out: Path, kind: str) -> None:
    shard = next(out.glob("*.safetensors"))
    shard.unlink()
    if kind == "fifo":
        os.mkfifo(shard)
    elif kind == "folder":
        shard.mkdir()
    else:
        shard.symlink_to("nowhere")
    check_found(out, shard.name)


def test_all_problems_are_listed_not_only_the_first(out: Path) -> None:
    shards = sorted(out.glob("*.safetensors"))
    for shard in shards:
        flip(shard, shard.stat().st_size - 1, 1)
    flip(out / "chat_template.jinja", 0, 1)
    assert len(problems(out)) == len(shards) + 1


# --- the command


def test_command_names_every_problem_and_exits_8(capsys: Capture, out: Path) -> None:
    shard = sorted(out.glob("*.safetensors"))[-1]
    *_, last = header_of(shard).tensors
    flip(shard, shard.stat().st_size - 1, 1)
    flip(out / "config.json", 0, 1)
    ended = call(capsys, "verify", out)
    assert ended.code == 8
    lines = ended.err.splitlines()
    assert all(line.startswith(f"moe-surgery: {out}/") for line in lines)
    assert any(f"{shard}: tensor '{last}'" in line for line in lines)
    assert any("config.json" in line for line in lines)
    assert ended.out == ""


def test_command_says_what_was_checked(capsys: Capture, out: Path, source: Path) -> None:
    ended = call(capsys, "verify", out, "--source", source)
    assert ended.code == 0
    assert ended.out.startswith(f"{out}: sound (")
    assert ended.err == ""
    found = call(capsys, "verify", out, "--json").json()
    assert found["ok"] is True
    assert found["problems"] == []


# --- without manifest


def test_checkpoint_without_manifest_needs_structure_only(capsys: Capture, source: Path) -> None:
    ended = call(capsys, "verify", source)
    assert ended.code == 5
    assert "surgery.json: not found" in ended.error
    assert "--structure-only" in ended.error
    ended = call(capsys, "verify", source, "--structure-only")
    assert ended.code == 0
    assert "structure only" in ended.out
    assert call(capsys, "verify", source, "--structure-only", "--source", source).code == 2
    assert call(capsys, "verify", source / "no").code == 5


def test_structure_only_finds_what_headers_show(capsys: Capture, out: Path) -> None:
    shard = next(out.glob("*.safetensors"))
    flip(shard, shard.stat().st_size - 1, 1)
    assert verify_checkpoint(out, structure_only=True).ok
    assert verify_checkpoint(out, structure_only=True).bytes_read == 0
    (out / "surgery.json").unlink()
    config = json.loads((out / "config.json").read_bytes())
    (out / "config.json").write_text(json.dumps(config | {"num_local_experts": 2}))
    ended = call(capsys, "verify", out, "--structure-only")
    assert ended.code == 8
    assert "shape" in ended.error


# --- against a source


def test_source_with_other_weights_names_each_tensor(source: Path, out: Path, tmp_path: Path) -> None:
    layout = "mxfp4" if "quantization_config" in (source / "config.json").read_text() else "bf16"
    other = write_checkpoint(tmp_path / "other", layout=layout, shards=2, seed=1)
    found = verify_checkpoint(out, source=other)
    named = {p.split("'")[1] for p in found.problems}
    assert named == set(load_tensors(out))
    assert all(p.endswith(f": differs from the kept experts of {other}") for p in found.problems)


def test_source_that_differs_in_one_kept_byte_is_found(source: Path, out: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(source, other)
    for shard in sorted(other.glob("*.safetensors")):
        *_, last = header_of(shard).tensors
        flip(shard, shard.stat().st_size - 1, 1)
        found = verify_checkpoint(out, source=other)
        # the last expert is kept; a weight may have been split in two, or joined from two
        assert {p.split("'")[1].removesuffix("_blocks").removesuffix("_scales") for p in found.problems} == {
            last.removesuffix("_blocks").removesuffix("_scales")
        }
        flip(shard, shard.stat().st_size - 1, 1)
    assert verify_checkpoint(out, source=other).ok


def test_source_of_another_shape_is_refused(out: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", Shape(experts=5))
    with pytest.raises(PlanMismatchError, match="the plan is for gpt_oss with 2 layers of 4 experts"):
        verify_checkpoint(out, source=other)


def test_source_laid_out_otherwise_is_compared_all_the_same(source: Path, out: Path, tmp_path: Path) -> None:
    layout = "mxfp4" if "quantization_config" in (source / "config.json").read_text() else "bf16"
    other = write_checkpoint(tmp_path / "other", layout=layout, shards=5)
    found = verify_checkpoint(out, source=other)
    assert found.ok
    assert ["shards are not laid out as in the source" in note for note in found.notes] == [True]


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
                said = record["tensors"][tensor]
                assert said["dtype"] == entry["dtype"]
                assert said["shape"] == entry["shape"]
                assert said["xxh3_128"] == xxhash.xxh3_128_hexdigest(bytes(entry["data"]))
        else:
            assert record["tensors"] == {}
    assert seen == set(contents(out))
    blank = (out / "surgery.json").read_bytes().replace(manifest["digest"].encode(), b"0" * 32, 1)
    assert xxhash.xxh3_128_hexdigest(blank) == manifest["digest"]
