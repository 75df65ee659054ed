"""`dense="q8_0"`: attention, embedding and unembedding as the gguf package quantises them, the rest untouched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_surgery import export_gguf
from moe_surgery.errors import InvalidInputError, UsageError
from tests.export.reading import Read, gguf, read
from tests.support.checkpoints import LAYOUTS, Shape, Tensors, write_checkpoint

SHAPES = {
    "small": Shape(),
    "beyond a chunk": Shape(layers=1, experts=2, hidden=1120, intermediate=32, vocabulary=4001),
}


def is_dense(name: str) -> bool:
    """The 2-D weights but for the router and what has experts: llama-quantize's rule for MXFP4_MOE."""
    return name in ("token_embd.weight", "output.weight") or (
        ".attn_" in name and name.endswith(("q.weight", "k.weight", "v.weight", "output.weight"))
    )


def exported(source: Path, name: str, **options: object) -> Read:
    out = source.with_name(f"{name}.gguf")
    export_gguf(source, out, tokenizer=False, name="same", **options)  # type: ignore[arg-type]
    return read(out)


def assert_quantised(kept: Read, got: Read) -> None:
    assert list(got.tensors) == list(kept.tensors)
    dense = [name for name in kept.tensors if is_dense(name)]
    assert len(dense) == 2 + 4 * kept.metadata["gpt-oss.block_count"]
    for name, (kind, shape, _, content) in kept.tensors.items():
        assert got.tensors[name][1] == shape
        if name in dense:
            expected = gguf.quants.quantize(kept.values(name), gguf.GGMLQuantizationType.Q8_0)
            assert (got.tensors[name][0], got.tensors[name][3]) == ("Q8_0", expected.tobytes()), name
        else:
            assert (got.tensors[name][0], got.tensors[name][3]) == (kind, content), name
    assert got.metadata == kept.metadata


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matrices_are_those_of_the_gguf_package(shape: Shape, layout: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", shape, layout, shards=2)
    assert_quantised(exported(source, "kept"), exported(source, "q8", dense="q8_0"))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_matrices_of_other_types(dtype: type, tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"):
            tensors[name] = np.random.default_rng(1).normal(size=tensors[name].shape).astype(dtype)

    source = write_checkpoint(tmp_path / "in", edit_tensors=edit)
    assert_quantised(exported(source, "kept"), exported(source, "q8", dense="q8_0"))


def test_a_tied_head_is_quantised_like_the_embedding(tmp_path: Path) -> None:
    source = write_checkpoint(
        tmp_path / "in",
        edit_tensors=lambda t: t.pop("lm_head.weight"),
        edit_config=lambda c: c.update(tie_word_embeddings=True),
    )
    got = exported(source, "q8", dense="q8_0")
    assert_quantised(exported(source, "kept"), got)
    assert got.tensors["output.weight"][3] == got.tensors["token_embd.weight"][3]


def test_experts_and_matrices_are_converted_independently(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", layout="bf16")
    both = exported(source, "both", store="mxfp4", dense="q8_0")
    assert_quantised(exported(source, "mxfp4", store="mxfp4"), both)
    assert both.metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_MXFP4_MOE


def test_the_bundled_model_is_smaller_by_what_q8_0_saves(tmp_path: Path) -> None:
    kept = export_gguf("example:tiny", tmp_path / "kept.gguf", dry_run=True).program
    q8 = export_gguf("example:tiny", tmp_path / "q8.gguf", dense="q8_0").program
    assert q8.bytes_by_type()["Q8_0"] == kept.bytes_by_type()["BF16"] // 64 * 34
    assert q8.as_dict()["dense_storage"] == "q8_0"
    assert (tmp_path / "q8.gguf").stat().st_size == q8.nbytes


def test_what_q8_0_cannot_hold_is_refused(tmp_path: Path) -> None:
    narrow = write_checkpoint(tmp_path / "narrow", Shape(hidden=48, intermediate=40), "bf16")
    with pytest.raises(
        UsageError, match=r"`dense` q8_0: tensor 'model\.embed_tokens\.weight' has 48 columns"
    ):
        exported(narrow, "out", dense="q8_0")
    with pytest.raises(UsageError, match="`dense` q4_0: choose one of keep, q8_0"):
        exported(narrow, "out", dense="q4_0")

    def edit(tensors: Tensors) -> None:
        tensors["lm_head.weight"][5, 7] = 0x7FC0

    source = write_checkpoint(tmp_path / "nan", edit_tensors=edit)
    pattern = (
        r"tensor 'lm_head\.weight', from row \d+: values from \d+: a NaN or an infinity; it cannot be stored"
    )
    with pytest.raises(InvalidInputError, match=pattern):
        exported(source, "out", dense="q8_0")
    assert not (tmp_path / "out.gguf").exists()
