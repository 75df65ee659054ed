"""The manifest as untrusted input: its digest detects damage, not forgery."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from moe_surgery import __version__
from moe_surgery.errors import InvalidInputError, OutputError, VerificationError
from moe_surgery.pipeline.pruning import prune
from moe_surgery.selection.plan import plan_keeping
from moe_surgery.surgery.manifest import is_ours, load_manifest
from moe_surgery.surgery.verify import verify_checkpoint

from ..support.checkpoints import INDEX, load_tensors, save_tensors, write_checkpoint
from ..support.command import call, run
from ..support.manifests import Document, rewrite


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source")


@pytest.fixture
def out(source: Path, tmp_path: Path) -> Path:
    prune(source, tmp_path / "out", lambda m: plan_keeping([3, 1], m))
    return tmp_path / "out"


def test_manifest_records_the_job(source: Path, out: Path) -> None:
    manifest = load_manifest(out / "surgery.json")
    assert manifest.plan.layers == ((3, 1), (3, 1))
    assert manifest.expert_format.name == "mxfp4"
    assert manifest.tool == f"moe-surgery {__version__}"
    shard = source / "model.safetensors"
    (recorded,) = manifest.sources
    assert (recorded["name"], recorded["size"]) == (shard.name, shard.stat().st_size)
    length = int.from_bytes(shard.read_bytes()[:8], "little")
    assert recorded["header_digest"] == xxhash.xxh3_128_hexdigest(shard.read_bytes()[: 8 + length])


def test_manifest_with_a_fitting_digest_is_read(out: Path) -> None:
    rewrite(out, lambda d: d.update(note="an unknown key"))
    assert verify_checkpoint(out).ok


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("files"),
        lambda d: d.update(files=[]),
        lambda d: d.update(files={"a": 1}),
        lambda d: d["files"].update({"x": {}}),
        lambda d: d["files"]["config.json"].update(size="7"),
        lambda d: d["files"]["config.json"].update(size=7.5),
        lambda d: d["files"]["config.json"].update(xxh3_128=7),
        lambda d: d["files"]["config.json"].update(tensors=[]),
        lambda d: d["files"]["model.safetensors"]["tensors"]["lm_head.weight"].pop("shape"),
        lambda d: d["files"]["model.safetensors"]["tensors"]["lm_head.weight"].update(shape=3),
        lambda d: d["files"]["model.safetensors"]["tensors"]["lm_head.weight"].update(dtype=[]),
        lambda d: d["files"]["model.safetensors"]["tensors"].update(a="b"),
        lambda d: d.update(source=[]),
        lambda d: d.update(source={"files": 5}),
        lambda d: d.update(source={"files": [5]}),
        lambda d: d.update(source={"files": [{"name": "a"}]}),
        lambda d: d.update(tool="moe-surgery"),
        lambda d: d.update(tool={"name": "moe-surgery"}),
        lambda d: d.update(expert_storage=4),
        lambda d: d.update(expert_storage="q4_0"),
        lambda d: d.update(plan=[]),
        lambda d: d.update(plan={}),
        lambda d: d["plan"].update(layers=[[0, 9], [0, 1]]),
    ],
)
def test_manifest_with_a_field_missing_or_of_another_type_is_refused(
    out: Path, change: Callable[[Document], object]
) -> None:
    path = rewrite(out, change)
    with pytest.raises(InvalidInputError) as caught:
        load_manifest(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).isprintable()
    assert verify_checkpoint(out).problems == (str(caught.value),)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ".", "", "a\0b/c"])
def test_manifest_cannot_name_a_file_outside_its_folder(out: Path, name: str) -> None:
    (out.parent / "secret").write_text("not to be read")
    path = rewrite(out, lambda d: d["files"].update({name: d["files"]["config.json"]}))
    with pytest.raises(InvalidInputError, match="is not a plain file name"):
        load_manifest(path)


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_unknown_version_is_refused(out: Path, version: object) -> None:
    path = rewrite(out, lambda d: d.update(version=version))
    with pytest.raises(InvalidInputError, match=r"manifest version .* is not supported"):
        load_manifest(path)


def test_other_json_is_no_manifest(out: Path) -> None:
    path = rewrite(out, lambda d: d.update(format="else"))
    with pytest.raises(InvalidInputError, match="not a manifest of moe-surgery"):
        load_manifest(path)
    assert not is_ours(out)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"format": 1}', b"\xff", b"[" * 100_000])
def test_random_bytes_are_refused_as_a_manifest(out: Path, content: bytes) -> None:
    (out / "surgery.json").write_bytes(content)
    assert not is_ours(out)
    with pytest.raises(InvalidInputError):
        load_manifest(out / "surgery.json")


def test_manifest_that_cannot_be_read_is_not_ours(tmp_path: Path) -> None:
    assert not is_ours(tmp_path)
    assert not is_ours(tmp_path / "nowhere")
    (tmp_path / "surgery.json").mkdir()
    assert not is_ours(tmp_path)
    with pytest.raises(OutputError):
        load_manifest(tmp_path / "nowhere" / "surgery.json")


def test_a_manifest_that_the_system_refuses_to_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "surgery.json").symlink_to("surgery.json")
    with pytest.raises(OutputError, match=r"surgery\.json: cannot open: Too many levels of symbolic links"):
        is_ours(tmp_path)
    with pytest.raises(OutputError, match=r"cannot open: File name too long"):
        is_ours(tmp_path / ("x" * 300))


def test_altered_manifest_is_still_ours_but_does_not_hold(out: Path) -> None:
    path = out / "surgery.json"
    path.write_bytes(path.read_bytes() + b"\n")
    assert is_ours(out)
    with pytest.raises(VerificationError, match="the manifest was modified"):
        load_manifest(path)


def test_tensors_under_wrong_names_are_found(out: Path) -> None:
    def rename(document: Document) -> None:
        tensors = document["files"]["model.safetensors"]["tensors"]
        tensors["model.other.weight"] = tensors.pop("lm_head.weight")

    rewrite(out, rename)
    shard = out / "model.safetensors"
    assert set(verify_checkpoint(out).problems) == {
        f"{shard}: tensor 'lm_head.weight' is BF16 [24, 64] in the header, absent in surgery.json",
        f"{shard}: tensor 'model.other.weight' is absent in the header, BF16 [24, 64] in surgery.json",
    }


@pytest.mark.parametrize("key", ["layers", "storage"])
def test_manifest_with_a_wrong_plan_is_detected_with_the_source(
    capsys: pytest.CaptureFixture[str], source: Path, out: Path, key: str
) -> None:
    if key == "layers":
        rewrite(out, lambda d: d["plan"].update(layers=[[3, 2], [3, 1]]))
    else:
        rewrite(out, lambda d: d.update(expert_storage="bf16"))
    assert verify_checkpoint(out).ok
    ended = call(capsys, "verify", out, "--source", source)
    assert ended.code == 8
    assert str(out / "model.safetensors") in ended.err


@pytest.mark.parametrize("damaged", [False, True])
def test_scales_in_a_shard_without_their_blocks_are_compared_with_the_source(
    tmp_path: Path, damaged: bool
) -> None:
    source, out = write_checkpoint(tmp_path / "source", layout="bf16"), tmp_path / "out"
    prune(source, out, lambda m: plan_keeping([0, 1], m), store="mxfp4")
    tensors = load_tensors(out)
    name = "model.layers.1.mlp.experts.down_proj_scales"
    if damaged:
        tensors[name] = tensors[name].copy()
        tensors[name][1, -1, -1] ^= 1
    (out / "model.safetensors").unlink()
    files: dict[str, Any] = {}
    for file, scales in (("a.safetensors", False), ("b.safetensors", True)):
        part = {n: t for n, t in tensors.items() if n.endswith("_scales") is scales}
        save_tensors(out / file, part)
        records = {
            n: {
                "dtype": {"uint8": "U8", "uint16": "BF16"}[t.dtype.name],
                "shape": t.shape,
                "xxh3_128": xxhash.xxh3_128_hexdigest(t.tobytes()),
            }
            for n, t in part.items()
        }
        files[file] = {"tensors": records}
    weight_map = {n: file for file, record in files.items() for n in record["tensors"]}
    (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    files[INDEX] = {"tensors": {}}
    for file, record in files.items():
        raw = (out / file).read_bytes()
        record |= {"size": len(raw), "xxh3_128": xxhash.xxh3_128_hexdigest(raw)}
    rewrite(out, lambda d: (d["files"].pop("model.safetensors"), d["files"].update(files)))
    assert verify_checkpoint(out).ok
    ended = run("verify", out, "--source", source)
    assert ended.code == (8 if damaged else 0)
    problem = f"{out / 'b.safetensors'}: tensor '{name}': differs from the kept experts of {source}"
    assert (problem in ended.err) is damaged
