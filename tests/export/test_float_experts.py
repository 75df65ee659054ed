"""F16 and F32 checkpoints as GGUF, read by the gguf package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_surgery import export_gguf, plan_keeping, prune
from moe_surgery.pipeline.planning import make_plan
from tests.export.reading import read
from tests.support.checkpoints import E2M1, Shape, load_tensors, write_checkpoint
from tests.support.floats import as_float64, in_dtype, is_expert_weight

SHAPES = {
    "small": Shape(),
    "beyond a chunk": Shape(layers=1, experts=3, hidden=1120, intermediate=1312, vocabulary=101),
}
FILE_TYPES = {"f16": 1, "f32": 0}
EXPERTS = "model.layers.0.mlp.experts."


def expert_weights(source: Path) -> dict[str, np.ndarray]:
    """Name in GGUF -> values [experts, rows, columns] of layer 0, in the source's dtype."""
    tensors = load_tensors(source)
    gate_up, down = (np.swapaxes(tensors[EXPERTS + n], 1, 2) for n in ("gate_up_proj", "down_proj"))
    return {
        "blk.0.ffn_gate_exps.weight": gate_up[:, 0::2],
        "blk.0.ffn_up_exps.weight": gate_up[:, 1::2],
        "blk.0.ffn_down_exps.weight": down,
    }


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("stored", ["f16", "f32"])
def test_every_weight_keeps_its_type_and_bits(stored: str, shape: Shape, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", shape, "bf16", shards=2, edit_tensors=in_dtype(stored))
    export_gguf(source, tmp_path / "out.gguf", tokenizer=False)
    got, tensors = read(tmp_path / "out.gguf"), load_tensors(source)
    expected = expert_weights(source) | {
        "token_embd.weight": tensors["model.embed_tokens.weight"],
        "output.weight": tensors["lm_head.weight"],
        "blk.0.attn_q.weight": tensors["model.layers.0.self_attn.q_proj.weight"],
        "blk.0.attn_output.weight": tensors["model.layers.0.self_attn.o_proj.weight"],
    }
    for name, values in expected.items():
        kind, dims, _, raw = got.tensors[name]
        assert (kind, dims) == (stored.upper(), values.shape), name
        assert raw == np.ascontiguousarray(values).tobytes(), name
    for name, part in (
        ("ffn_gate_inp.weight", "router.weight"),
        ("ffn_down_exps.bias", "experts.down_proj_bias"),
    ):
        kind, _, _, raw = got.tensors[f"blk.0.{name}"]
        assert kind == "F32"
        assert raw == tensors[f"model.layers.0.mlp.{part}"].astype(np.float32).tobytes()
    assert got.metadata["general.file_type"] == FILE_TYPES[stored]


@pytest.mark.parametrize(
    ("stored", "shape"),
    [
        ("f16", "small"),
        ("f32", "small"),
        ("f32", "beyond a chunk"),
        pytest.param("f16", "beyond a chunk", marks=pytest.mark.slow),
    ],
)
def test_as_mxfp4_every_value_is_the_nearest(stored: str, shape: str, tmp_path: Path) -> None:
    edit = in_dtype(stored, is_expert_weight)
    source = write_checkpoint(tmp_path / "in", SHAPES[shape], "bf16", edit_tensors=edit)
    export_gguf(source, tmp_path / "out.gguf", store="mxfp4", tokenizer=False)
    got = read(tmp_path / "out.gguf")
    assert got.metadata["general.file_type"] == 38
    for name, values in expert_weights(source).items():
        kind, dims, _, raw = got.tensors[name]
        assert (kind, dims) == ("MXFP4", values.shape)
        x, result = as_float64(values)[-1], got.values(name).astype(np.float64)[-1]
        blocks = np.frombuffer(raw, np.uint8).reshape(*dims[:-1], dims[-1] // 32, 17)
        scale = blocks[-1, ..., 0].astype(int)[..., None]
        grid = np.ldexp(E2M1.astype(np.float64), scale - 127).repeat(32, axis=-2)
        assert (np.abs(x - result) == np.abs(np.abs(x)[..., None] - grid).min(axis=-1)).all(), name


@pytest.mark.parametrize("dtype", ["keep", "mxfp4"])
@pytest.mark.parametrize("stored", ["f16", "f32"])
def test_a_plan_on_the_way_gives_the_pruned_checkpoints_file(stored: str, dtype: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", None, "bf16", edit_tensors=in_dtype(stored))
    plan = make_plan(source, lambda model: plan_keeping([3, 1], model))
    prune(source, tmp_path / "pruned", plan, store=dtype)
    export_gguf(tmp_path / "pruned", tmp_path / "one.gguf", name="same", tokenizer=False)
    export_gguf(source, tmp_path / "other.gguf", plan=plan, store=dtype, name="same", tokenizer=False)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "other.gguf").read_bytes()
