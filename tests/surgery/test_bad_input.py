"""Bad input, through the command line: one line that names the culprit, the right exit code, nothing left."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ..support.checkpoints import (
    INDEX,
    Shape,
    Tensors,
    load_tensors,
    make_config,
    save_tensors,
    write_checkpoint,
    write_folder,
)
from ..support.command import assert_sound, call, contents

Capture = pytest.CaptureFixture[str]

ROUTER = "model.layers.1.mlp.router.weight"
BLOCKS = "model.layers.0.mlp.experts.down_proj_blocks"
SCALES = "model.layers.0.mlp.experts.down_proj_scales"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", shards=2)


def refused(
    capsys: Capture, code: int, *why: str, source: Path, options: tuple[str | Path, ...] = ()
) -> None:
    """Pruning `source` ends with `code` and one line that holds each of `why`; nothing else happens."""
    before = contents(source.parent)
    names = sorted(os.listdir(source.parent))
    ended = call(capsys, "prune", source, source.parent / "out", *(options or ("--keep", "0,1")))
    assert ended.code == code, ended.err
    for part in why:
        assert part in ended.error
    assert ended.error.startswith("moe-surgery: ")
    assert ended.error.isprintable()
    assert ended.out == ""
    assert sorted(os.listdir(source.parent)) == names
    assert contents(source.parent) == before


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file in place."""
    value = json.loads(path.read_bytes())
    change(value)
    path.write_text(json.dumps(value))


def home(source: Path, tensor: str) -> str:
    """The shard that holds `tensor`."""
    name = json.loads((source / INDEX).read_bytes())["weight_map"][tensor]
    assert isinstance(name, str)
    return name


def other(shard: str) -> str:
    return SECOND if shard == FIRST else FIRST


def shard_tensors(source: Path, shard: str) -> Tensors:
    mine = {n for n, s in json.loads((source / INDEX).read_bytes())["weight_map"].items() if s == shard}
    return {n: t for n, t in load_tensors(source).items() if n in mine}


# --- shards and index


def test_missing_shard_is_named(capsys: Capture, source: Path) -> None:
    (source / SECOND).unlink()
    refused(capsys, 5, str(source / SECOND), "listed in", "missing (1 of 2 shards)", source=source)


def test_tensor_missing_from_its_shard_is_named(capsys: Capture, source: Path) -> None:
    shard = home(source, ROUTER)
    tensors = shard_tensors(source, shard)
    del tensors[ROUTER]
    save_tensors(source / shard, tensors)
    refused(capsys, 3, str(source / shard), f"lacks tensor '{ROUTER}'", source=source)


@pytest.mark.parametrize(
    "tensor", [ROUTER, BLOCKS, SCALES, "lm_head.weight", "model.layers.1.self_attn.sinks"]
)
def test_tensor_missing_everywhere_is_named(capsys: Capture, tmp_path: Path, tensor: str) -> None:
    source = write_checkpoint(tmp_path / "source", shards=2, edit_tensors=lambda t: t.pop(tensor))
    refused(capsys, 3, str(source), f"{tensor!r} is in no shard", source=source)


def test_layer_missing_everywhere_is_named(capsys: Capture, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", edit_config=lambda c: c.update(num_hidden_layers=3))
    refused(capsys, 3, "model.layers.2.", "is in no shard", source=source)


def test_layer_too_many_is_named(capsys: Capture, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", edit_config=lambda c: c.update(num_hidden_layers=1))
    refused(capsys, 3, "model.safetensors", "model.layers.1.", "surplus", source=source)


def test_index_that_names_an_absent_tensor(capsys: Capture, source: Path) -> None:
    edit(source / INDEX, lambda i: i["weight_map"].update({"model.extra": FIRST}))
    refused(capsys, 3, str(source / FIRST), "lacks tensor 'model.extra'", source=source)


def test_index_that_names_the_wrong_shard(capsys: Capture, source: Path) -> None:
    shard = home(source, ROUTER)
    edit(source / INDEX, lambda i: i["weight_map"].update({ROUTER: other(shard)}))
    refused(capsys, 3, shard, ROUTER, f"says it is in {other(shard)}", source=source)


def test_tensor_in_two_shards(capsys: Capture, source: Path) -> None:
    shard = home(source, ROUTER)
    tensors = shard_tensors(source, other(shard)) | {ROUTER: load_tensors(source)[ROUTER]}
    save_tensors(source / other(shard), tensors)
    refused(capsys, 3, other(shard), ROUTER, f"says it is in {shard}", source=source)
    (source / INDEX).unlink()
    refused(capsys, 3, SECOND, f"tensor '{ROUTER}' is also in {FIRST}", source=source)


def test_model_safetensors_beside_an_index_is_refused_or_ignored(capsys: Capture, source: Path) -> None:
    out = source.parent / "out"
    save_tensors(source / "model.safetensors", {"extra": np.zeros(3, np.uint8)})
    refused(capsys, 3, str(source / "model.safetensors"), "--ignore-unlisted", source=source)
    assert call(capsys, "prune", source, out, "--keep", "0,1", "--ignore-unlisted").code == 0
    (source / "model.safetensors").unlink()
    assert_sound(out, source)


def test_unlisted_tensor_is_refused_or_ignored(capsys: Capture, source: Path) -> None:
    out = source.parent / "out"
    save_tensors(source / FIRST, shard_tensors(source, FIRST) | {"extra": np.zeros(3, np.uint8)})
    refused(capsys, 3, str(source / FIRST), "tensor 'extra'", "does not list it", source=source)
    assert call(capsys, "prune", source, out, "--keep", "0,1", "--ignore-unlisted").code == 0
    assert "extra" not in load_tensors(out)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[]", "must be a JSON object"),
        (b"{}", "weight_map is missing"),
        (b'{"weight_map": {"a": "../evil.safetensors"}}', "must be a plain file name"),
        (b'{"weight_map": {"a": "/etc/passwd"}}', "must be a plain file name"),
        (b'{"weight_map": {"a": "x.bin"}}', "does not end in .safetensors"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "duplicate key"),
    ],
)
def test_index_that_is_none(capsys: Capture, source: Path, content: bytes, why: str) -> None:
    (source / INDEX).write_bytes(content)
    refused(capsys, 3, str(source / INDEX), why, source=source)


def test_folder_without_shards(capsys: Capture, source: Path) -> None:
    for file in (FIRST, SECOND, INDEX):
        (source / file).unlink()
    refused(capsys, 5, f"{source}: holds no .safetensors file", source=source)


@pytest.mark.parametrize("name", ["nothing", "no/such", "a/b/c/d"])
def test_checkpoint_that_is_not_there(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    ended = call(capsys, "prune", name, tmp_path / "out", "--keep", "0")
    assert ended.code == 5
    assert name in ended.error
    assert not (tmp_path / "out").exists()


def test_file_that_is_no_checkpoint(capsys: Capture, source: Path) -> None:
    ended = call(capsys, "prune", source / "config.json", source.parent / "out", "--keep", "0")
    assert ended.code == 2
    assert "is the config.json of a model, not a checkpoint; name its folder" in ended.error


def test_unknown_example(capsys: Capture, tmp_path: Path) -> None:
    ended = call(capsys, "prune", "example:huge", tmp_path / "out", "--keep", "0")
    assert ended.code == 2
    assert ended.error == "moe-surgery: example:huge: unknown example; known: tiny"


# --- bytes of a shard


def test_truncated_shard(capsys: Capture, source: Path) -> None:
    os.truncate(source / FIRST, (source / FIRST).stat().st_size - 1)
    refused(capsys, 3, str(source / FIRST), "cut short", source=source)


def test_shard_cut_in_its_header(capsys: Capture, source: Path) -> None:
    os.truncate(source / FIRST, 100)
    refused(capsys, 3, str(source / FIRST), "cut short", source=source)


def test_empty_shard(capsys: Capture, source: Path) -> None:
    os.truncate(source / FIRST, 0)
    refused(capsys, 3, str(source / FIRST), "0 bytes are too few", source=source)


def test_shard_with_bytes_after_the_last_tensor(capsys: Capture, source: Path) -> None:
    os.truncate(source / FIRST, (source / FIRST).stat().st_size + 7)
    refused(capsys, 3, str(source / FIRST), "7 bytes after the last tensor", source=source)


def test_large_file_pointer_in_place_of_a_shard(capsys: Capture, source: Path) -> None:
    (source / FIRST).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4792272488\n"
    )
    refused(capsys, 3, str(source / FIRST), "Git LFS pointer", "git lfs pull", source=source)


@pytest.mark.parametrize("kind", ["fifo", "directory", "dangling link", "link to a device"])
@pytest.mark.parametrize("file", [FIRST, INDEX, "config.json"])
def test_no_regular_file(capsys: Capture, source: Path, kind: str, file: str) -> None:
    path = source / file
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    else:
        path.symlink_to("/dev/zero")
    refused(capsys, 5 if kind == "dangling link" else 3, str(path), source=source)


def test_unprintable_names_are_shown_escaped(capsys: Capture, tmp_path: Path) -> None:
    name = "\x1b[2Jevil\nname\u202e"
    source = write_checkpoint(
        tmp_path / "source", edit_tensors=lambda t: t.update({name: np.zeros(3, np.uint8)})
    )
    refused(capsys, 3, "\\x1b[2Jevil\\nname\\u202e", source=source)


# --- config


def test_missing_config(capsys: Capture, source: Path) -> None:
    (source / "config.json").unlink()
    refused(capsys, 5, f"{source / 'config.json'}: not found", source=source)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe{}", b"[1]", b"{} {}", b'{"a": 1, "a": 2}', b"null"]
)
def test_config_that_is_no_json_object(capsys: Capture, source: Path, content: bytes) -> None:
    (source / "config.json").write_bytes(content)
    refused(capsys, 3, str(source / "config.json"), source=source)


@pytest.mark.parametrize("model_type", ["llama", "GPT_OSS", "", 7, ["gpt_oss"], {}])
def test_unknown_model_type(capsys: Capture, source: Path, model_type: object) -> None:
    edit(source / "config.json", lambda c: c.update(model_type=model_type))
    refused(capsys, 3, str(source / "config.json"), "model_type", "gpt_oss", source=source)


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "hidden_size", "num_local_experts", "num_experts_per_tok"]
)
@pytest.mark.parametrize("value", [None, 0, -1, 1.5, "4", True, 10**30, [4], 3])
def test_config_that_contradicts_the_tensors(capsys: Capture, source: Path, key: str, value: object) -> None:
    if key == "num_experts_per_tok" and value == 3:
        value = 5  # of 4 experts
    edit(source / "config.json", lambda c: c.update({key: value}) or c.pop("experts_per_token"))
    refused(capsys, 3, source=source)


# --- tensors of the wrong kind


@pytest.mark.parametrize(
    ("tensor", "shape"),
    [
        (SCALES, (4, 64, 2)),
        (SCALES, (3, 64, 1)),
        (SCALES, (4, 64)),
        (BLOCKS, (4, 64, 1, 8)),
        (BLOCKS, (4, 32, 2, 16)),
        (BLOCKS, (5, 64, 1, 16)),
        (ROUTER, (3, 64)),
        (ROUTER, (4, 32)),
        ("model.layers.0.mlp.experts.down_proj_bias", (5, 64)),
        ("model.norm.weight", (63,)),
    ],
)
def test_tensor_of_another_shape(
    capsys: Capture, tmp_path: Path, tensor: str, shape: tuple[int, ...]
) -> None:
    def reshape(tensors: Tensors) -> None:
        tensors[tensor] = np.zeros(shape, tensors[tensor].dtype)

    source = write_checkpoint(tmp_path / "source", edit_tensors=reshape)
    shown = str(list(shape))
    refused(capsys, 3, str(source / "model.safetensors"), tensor, shown, source=source)


@pytest.mark.parametrize("tensor", [ROUTER, BLOCKS, SCALES, "lm_head.weight"])
def test_tensor_of_another_dtype(capsys: Capture, tmp_path: Path, tensor: str) -> None:
    def recast(tensors: Tensors) -> None:
        wrong = np.uint16 if tensors[tensor].dtype == np.uint8 else np.uint8
        tensors[tensor] = np.zeros(tensors[tensor].shape, wrong)

    source = write_checkpoint(tmp_path / "source", edit_tensors=recast)
    refused(capsys, 3, str(source / "model.safetensors"), tensor, source=source)


def test_experts_stored_in_two_ways(capsys: Capture, tmp_path: Path) -> None:
    def mix(tensors: Tensors) -> None:
        del tensors[BLOCKS], tensors[SCALES]
        tensors[BLOCKS.removesuffix("_blocks")] = np.zeros((4, 32, 64), np.uint16)

    source = write_checkpoint(tmp_path / "source", edit_tensors=mix)
    refused(capsys, 3, "is stored as MXFP4", "as BF16", "must be all in one format", source=source)


# --- values that MXFP4 cannot hold


@pytest.mark.parametrize(
    "bits", [0x7FC0, 0xFFC1, 0x7F81, 0x7F80, 0xFF80], ids=["nan", "-nan", "snan", "inf", "-inf"]
)
@pytest.mark.parametrize("place", [(0, 0, 0), (2, 17, 30), (3, 31, 63)])
def test_value_without_mxfp4_names_the_tensor(
    capsys: Capture, tmp_path: Path, bits: int, place: tuple[int, int, int]
) -> None:
    tensor = "model.layers.1.mlp.experts.down_proj"

    def spoil(tensors: Tensors) -> None:
        tensors[tensor][place] = bits

    source = write_checkpoint(tmp_path / "source", layout="bf16", edit_tensors=spoil)
    why = (str(source / "model.safetensors"), f"tensor '{tensor}'", "cannot be stored as MXFP4")
    refused(capsys, 3, *why, source=source, options=("--keep", "all", "--store", "mxfp4"))
    assert call(capsys, "prune", source, tmp_path / "kept", "--keep", "all").code == 0
    assert (load_tensors(tmp_path / "kept")[tensor][place]) == bits


def test_value_without_mxfp4_in_an_expert_that_goes_is_no_matter(capsys: Capture, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["model.layers.1.mlp.experts.down_proj"][3] = 0x7FC0

    source = write_checkpoint(tmp_path / "source", layout="bf16", edit_tensors=spoil)
    assert call(capsys, "prune", source, tmp_path / "out", "--keep", "0-2", "--store", "mxfp4").code == 0
    assert_sound(tmp_path / "out", source)


def test_dimensions_that_are_no_whole_blocks(capsys: Capture, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", Shape(intermediate=48), "bf16")
    why = ("--store mxfp4", "down_proj", "48 columns")
    refused(capsys, 2, *why, source=source, options=("--keep", "0", "--store", "mxfp4"))
    assert call(capsys, "prune", source, tmp_path / "out", "--keep", "0").code == 0


# --- plans and options


def plan(**changes: object) -> dict[str, object]:
    return {
        "format": "moe-surgery.plan",
        "version": 1,
        "model_type": "gpt_oss",
        "num_source_experts": 4,
        "num_layers": 2,
        "top_k": None,
        "layers": [[0, 1], [1, 3]],
        "provenance": {},
    } | changes


@pytest.mark.parametrize(
    ("code", "changes", "why"),
    [
        (4, {"model_type": "mixtral"}, "the plan is for mixtral"),
        (4, {"num_source_experts": 32}, "2 layers of 32 experts"),
        (4, {"num_layers": 1, "layers": [[0]]}, "1 layers of 4 experts"),
        (4, {"layers": [[0, 1], [2]]}, "keeps between 1 and 2 experts per layer"),
        (3, {"layers": [[0, 4], [0, 1]]}, "layer 0 keeps expert 4, but experts are 0 to 3"),
        (3, {"layers": [[0, -1], [0, 1]]}, "layers"),
        (3, {"layers": [[0, 1], [2, 2]]}, "layer 1 keeps expert 2 twice"),
        (3, {"layers": [[0], []]}, "layers: layer 1"),
        (3, {"layers": [[0, 1]]}, "num_layers is 2, but layers has 1"),
        (3, {"layers": [[0, 1.0], [0, 1]]}, "layers"),
        (3, {"layers": [[0, True], [0, 1]]}, "layers"),
        (3, {"layers": "all"}, "layers"),
        (3, {"version": 2}, "plan version 2 is not known"),
        (3, {"format": "moe-surgery.ranking"}, "is a ranking, not a plan"),
        (3, {"format": "else"}, "not a plan"),
        (3, {"top_k": 0}, "top_k"),
    ],
)
def test_plan_that_cannot_be(
    capsys: Capture, source: Path, code: int, changes: dict[str, object], why: str
) -> None:
    path = source.parent / "plan.json"
    path.write_text(json.dumps(plan(**changes)))
    named = (why,) if code == 4 else (why, str(path))
    refused(capsys, code, *named, source=source, options=("--plan", path))


def test_plan_that_is_not_there(capsys: Capture, source: Path) -> None:
    path = source.parent / "plan.json"
    refused(capsys, 5, f"{path}: cannot open: No such file", source=source, options=("--plan", path))


@pytest.mark.parametrize("name", ["-1", "0", "5", "1000"])
def test_number_of_experts_out_of_range(capsys: Capture, source: Path, name: str) -> None:
    ranking = source.parent / "ranking.json"
    ranking.write_text(json.dumps({"layer_0": [3, 1, 0, 2], "layer_1": [0, 1, 2, 3]}))
    options = ("--ranking", ranking, "--experts", name)
    refused(capsys, 2, f"--experts {name}", "choose 1 to 4", source=source, options=options)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--keep", "4"), "--keep keeps expert 4, but experts are 0 to 3"),
        (("--keep", "0,1,0"), "--keep keeps expert 0 twice"),
        (("--store", "bf16"), "exactly one of --plan, --ranking and --keep"),
        (("--keep", "0", "--experts", "1"), "--ranking and --experts go together"),
        (("--keep", "0", "--max-shard-size", "0"), "--max-shard-size 0: must be at least one byte"),
    ],
)
def test_options_that_cannot_be(capsys: Capture, source: Path, options: tuple[str, ...], why: str) -> None:
    refused(capsys, 2, why, source=source, options=options)


@pytest.mark.parametrize(
    "options",
    [
        ("--keep", "x"),
        ("--keep", ""),
        ("--keep", "3-1"),
        ("--store", "fp8"),
        ("--max-shard-size", "1XB"),
        ("--no-such",),
    ],
)
def test_options_that_cannot_be_read(capsys: Capture, source: Path, options: tuple[str, ...]) -> None:
    ended = call(capsys, "prune", source, source.parent / "out", *options)
    assert ended.code == 2
    assert options[0] in ended.err
    assert "Traceback" not in ended.err
    assert os.listdir(source.parent) == ["source"]


def test_original_layout_without_its_config(capsys: Capture, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", {"a": np.zeros(4, np.uint8)}, make_config(Shape(), "original"))
    refused(capsys, 3, "gpt_oss", source=source)
