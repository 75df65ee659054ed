"""Configs and tensors that contradict each other, and values that MXFP4 cannot represent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.checkpoints import (
    Shape,
    Tensors,
    load_tensors,
    write_checkpoint,
)
from tests.support.command import assert_sound, call
from tests.surgery.refusals import (
    BLOCKS,
    ROUTER,
    SCALES,
    edit,
    refused,
)

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", shards=2)


def test_missing_config(capsys: Capture, source: Path) -> None:
    (source / "config.json").unlink()
    refused(capsys, 5, f"{source / 'config.json'}: not found", source=source)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe{}", b"[1]", b"{} {}", b'{"a": 1, "a": 2}', b"null"]
)
def test_config_must_be_a_json_object(capsys: Capture, source: Path, content: bytes) -> None:
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
    shape_text = str(list(shape))
    refused(capsys, 3, str(source / "model.safetensors"), tensor, shape_text, source=source)


@pytest.mark.parametrize("tensor", [ROUTER, BLOCKS, SCALES, "lm_head.weight"])
def test_tensor_of_another_dtype(capsys: Capture, tmp_path: Path, tensor: str) -> None:
    def recast(tensors: Tensors) -> None:
        wrong = np.uint16 if tensors[tensor].dtype == np.uint8 else np.uint8
        tensors[tensor] = np.zeros(tensors[tensor].shape, wrong)

    source = write_checkpoint(tmp_path / "source", edit_tensors=recast)
    refused(capsys, 3, str(source / "model.safetensors"), tensor, source=source)


def test_experts_in_two_formats(capsys: Capture, tmp_path: Path) -> None:
    def mix(tensors: Tensors) -> None:
        del tensors[BLOCKS], tensors[SCALES]
        tensors[BLOCKS.removesuffix("_blocks")] = np.zeros((4, 32, 64), np.uint16)

    source = write_checkpoint(tmp_path / "source", edit_tensors=mix)
    refused(capsys, 3, "is stored as MXFP4", "as BF16", "must have the same format", source=source)


# --- values that MXFP4 cannot hold


@pytest.mark.parametrize(
    "bits", [0x7FC0, 0xFFC1, 0x7F81, 0x7F80, 0xFF80], ids=["nan", "-nan", "snan", "inf", "-inf"]
)
@pytest.mark.parametrize("position", [(0, 0, 0), (2, 17, 30), (3, 31, 63)])
def test_value_that_mxfp4_cannot_represent_names_the_tensor(
    capsys: Capture, tmp_path: Path, bits: int, position: tuple[int, int, int]
) -> None:
    tensor = "model.layers.1.mlp.experts.down_proj"

    def spoil(tensors: Tensors) -> None:
        tensors[tensor][position] = bits

    source = write_checkpoint(tmp_path / "source", layout="bf16", edit_tensors=spoil)
    why = (str(source / "model.safetensors"), f"tensor '{tensor}'", "cannot be stored as MXFP4")
    refused(capsys, 3, *why, source=source, options=("--keep", "all", "--store", "mxfp4"))
    assert call(capsys, "prune", source, tmp_path / "kept", "--keep", "all").code == 0
    assert (load_tensors(tmp_path / "kept")[tensor][position]) == bits


def test_unrepresentable_value_in_a_removed_expert_is_ignored(capsys: Capture, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["model.layers.1.mlp.experts.down_proj"][3] = 0x7FC0

    source = write_checkpoint(tmp_path / "source", layout="bf16", edit_tensors=spoil)
    assert call(capsys, "prune", source, tmp_path / "out", "--keep", "0-2", "--store", "mxfp4").code == 0
    assert_sound(tmp_path / "out", source)


def test_dimensions_that_are_not_multiples_of_the_block_size(capsys: Capture, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", Shape(intermediate=48), "bf16")
    why = ("--store mxfp4", "down_proj", "48 columns")
    refused(capsys, 2, *why, source=source, options=("--keep", "0", "--store", "mxfp4"))
    assert call(capsys, "prune", source, tmp_path / "out", "--keep", "0").code == 0
