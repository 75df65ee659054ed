"""Every exported tensor has the checkpoint's values, and every byte of the file is checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from moe_surgery import export_gguf, plan_keeping, plan_random, prune
from moe_surgery.checkpoint.resolve import resolve
from moe_surgery.errors import InvalidInputError, MoeSurgeryError, PlanMismatchError, UsageError
from moe_surgery.pipeline.planning import make_plan
from moe_surgery.selection.plan import Plan
from tests.export.reading import Read, digest, read
from tests.support.checkpoints import (
    LAYOUTS,
    Shape,
    Tensors,
    decode,
    kept_tensors,
    load_tensors,
    make_tensors,
    random_bf16,
    write_checkpoint,
)

SHAPES = {
    "small": Shape(),
    "odd": Shape(layers=3, experts=5, top_k=3, hidden=96, intermediate=160, heads=3, kv_heads=1, head_dim=6),
    "one expert": Shape(experts=1, top_k=1, vocabulary=7),
    "beyond a chunk": Shape(layers=1, experts=3, hidden=1120, intermediate=1312, vocabulary=1001),
}
COUNTS = (1, 3, 8, 31)


def floats(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def expected(tensors: Tensors) -> dict[str, tuple[str, np.ndarray]]:
    """Name in GGUF -> type and float32 values, from tensors of the hub's layouts."""
    result: dict[str, tuple[str, np.ndarray]] = {
        "token_embd.weight": ("BF16", floats(tensors["model.embed_tokens.weight"])),
        "output.weight": ("BF16", floats(tensors["lm_head.weight"])),
        "output_norm.weight": ("F32", floats(tensors["model.norm.weight"])),
    }
    layers = {int(name.split(".")[2]) for name in tensors if name.startswith("model.layers.")}
    for layer in layers:
        source_prefix, target = f"model.layers.{layer}.", f"blk.{layer}."
        for name, renamed in (
            ("input_layernorm.weight", "attn_norm.weight"),
            ("post_attention_layernorm.weight", "post_attention_norm.weight"),
            ("self_attn.sinks", "attn_sinks.weight"),
            ("mlp.router.weight", "ffn_gate_inp.weight"),
            ("mlp.router.bias", "ffn_gate_inp.bias"),
            ("mlp.experts.down_proj_bias", "ffn_down_exps.bias"),
        ):
            result[target + renamed] = "F32", floats(tensors[source_prefix + name])
        for part in "qkvo":
            renamed = target + "attn_" + {"o": "output"}.get(part, part)
            result[renamed + ".weight"] = (
                "BF16",
                floats(tensors[f"{source_prefix}self_attn.{part}_proj.weight"]),
            )
            result[renamed + ".bias"] = "F32", floats(tensors[f"{source_prefix}self_attn.{part}_proj.bias"])
        bias = floats(tensors[source_prefix + "mlp.experts.gate_up_proj_bias"])
        result[target + "ffn_gate_exps.bias"] = "F32", bias[:, 0::2]
        result[target + "ffn_up_exps.bias"] = "F32", bias[:, 1::2]
        kind, gate_up = weight(tensors, source_prefix + "mlp.experts.gate_up_proj")
        result[target + "ffn_gate_exps.weight"] = kind, gate_up[:, 0::2]
        result[target + "ffn_up_exps.weight"] = kind, gate_up[:, 1::2]
        result[target + "ffn_down_exps.weight"] = weight(tensors, source_prefix + "mlp.experts.down_proj")
    return result


def weight(tensors: Tensors, name: str) -> tuple[str, np.ndarray]:
    """Type in GGUF and float32 values [experts, rows, columns] of an expert weight in any format."""
    blocks = tensors.get(name + "_blocks", tensors.get(name))
    assert blocks is not None
    if blocks.dtype == np.uint16:
        return "BF16", floats(np.swapaxes(blocks, 1, 2))
    return "MXFP4", floats(decode(blocks, tensors[name + "_scales"]))


def assert_holds(got: Read, tensors: Tensors) -> None:
    wanted = expected(tensors)
    assert sorted(got.tensors) == sorted(wanted)
    for name, (kind, values) in wanted.items():
        assert (got.tensors[name][0], got.tensors[name][1]) == (kind, values.shape), name
        np.testing.assert_array_equal(got.values(name), values, err_msg=name)
        if kind != "MXFP4":  # whose zeros have no sign in the gguf package
            assert got.values(name).tobytes() == np.ascontiguousarray(values).tobytes(), name


def assert_every_byte_accounted_for(got: Read) -> None:
    """Tensors are contiguous, aligned and zero-padded, and the last one ends the file."""
    raw = got.path.read_bytes()
    placed = sorted((offset, len(content)) for _, _, offset, content in got.tensors.values())
    for (offset, nbytes), following in zip(placed, [*(o for o, _ in placed[1:]), len(raw)], strict=True):
        assert offset % 32 == 0
        assert 0 <= following - offset - nbytes < 32
        assert not any(raw[offset + nbytes : following])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_layout_of_every_shape(shape: Shape, layout: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", shape, layout, shards=2)
    export_gguf(source, tmp_path / "out.gguf", tokenizer=False)
    got = read(tmp_path / "out.gguf")
    assert_holds(got, make_tensors(shape, "mxfp4" if layout == "original" else layout))
    assert_every_byte_accounted_for(got)
    assert got.metadata["gpt-oss.expert_count"] == shape.experts
    assert got.metadata["general.file_type"] == (32 if layout in ("bf16", "resaved") else 38)


@pytest.mark.parametrize("layout", ["mxfp4", "bf16"])
def test_experts_in_the_order_of_a_plan(layout: str, tmp_path: Path) -> None:
    shape = Shape(experts=6)
    source = write_checkpoint(tmp_path / "in", shape, layout, shards=3)
    layers = ((4, 0, 5), (3, 2, 1))
    plan = Plan("gpt_oss", 6, layers)
    export_gguf(source, tmp_path / "out.gguf", plan=plan, tokenizer=False)
    assert_holds(read(tmp_path / "out.gguf"), kept_tensors(make_tensors(shape, layout), layers))


@pytest.mark.parametrize("count", [32, *COUNTS])
def test_the_embedded_model_and_what_is_left_of_it(count: int, tmp_path: Path) -> None:
    source, tiny = resolve("example:tiny"), resolve("example:tiny")
    if count < 32:
        source = tmp_path / "pruned"
        prune(tiny, source, lambda model: plan_random(count, count, model))
    export_gguf(source, tmp_path / "out.gguf")
    got = read(tmp_path / "out.gguf")
    assert_holds(got, load_tensors(source))
    assert_every_byte_accounted_for(got)
    expected_text = {k: got.metadata[f"gpt-oss.{k}"] for k in ("expert_count", "expert_used_count")}
    assert expected_text == {"expert_count": count, "expert_used_count": min(4, count)}


@pytest.mark.parametrize("count", COUNTS)
def test_a_plan_on_the_way_gives_the_pruned_checkpoints_file(count: int, tmp_path: Path) -> None:
    plan = make_plan("example:tiny", lambda model: plan_random(count, 5, model))
    prune("example:tiny", tmp_path / "pruned", plan)
    export_gguf(tmp_path / "pruned", tmp_path / "one.gguf", name="same")
    export_gguf("example:tiny", tmp_path / "other.gguf", plan=plan, name="same")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "other.gguf").read_bytes()


def test_the_metadata_of_the_embedded_model(tmp_path: Path) -> None:
    """The values that llama.cpp's own converter writes for it."""
    export_gguf("example:tiny", tmp_path / "out.gguf")
    got = read(tmp_path / "out.gguf").metadata
    small = {k: v for k, v in got.items() if not k.startswith("GGUF.") and not isinstance(v, list)}
    template = (resolve("example:tiny") / "chat_template.jinja").read_text()
    assert small.pop("gpt-oss.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5, rel=1e-6)
    assert small == {
        "general.architecture": "gpt-oss",
        "general.type": "model",
        "general.name": "tiny-gpt-oss",
        "general.file_type": 38,
        "general.quantization_version": 2,
        "gpt-oss.block_count": 4,
        "gpt-oss.context_length": 4096,
        "gpt-oss.embedding_length": 160,
        "gpt-oss.feed_forward_length": 160,
        "gpt-oss.expert_feed_forward_length": 160,
        "gpt-oss.expert_count": 32,
        "gpt-oss.expert_used_count": 4,
        "gpt-oss.vocab_size": 2048,
        "gpt-oss.attention.head_count": 8,
        "gpt-oss.attention.head_count_kv": 2,
        "gpt-oss.attention.key_length": 32,
        "gpt-oss.attention.value_length": 32,
        "gpt-oss.attention.sliding_window": 64,
        "gpt-oss.rope.freq_base": 150000.0,
        "gpt-oss.rope.scaling.type": "yarn",
        "gpt-oss.rope.scaling.factor": 8.0,
        "gpt-oss.rope.scaling.original_context_length": 512,
        "gpt-oss.rope.scaling.yarn_beta_fast": 32.0,
        "gpt-oss.rope.scaling.yarn_beta_slow": 1.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": template,
    }
    lists = {k: len(v) for k, v in got.items() if isinstance(v, list)}
    assert lists == {
        "tokenizer.ggml.tokens": 2048,
        "tokenizer.ggml.token_type": 2048,
        "tokenizer.ggml.merges": 1709,
    }


@pytest.mark.parametrize(
    ("kept", "dtype", "converters"),
    [
        (None, "keep", "fb0b0f5ceb1a99c8ef4099fcaeb5bc72"),
        ([3, 9, 31], "bf16", "9a8358d5b332fcef530c7d10385fb09a"),
    ],
    ids=["mxfp4", "three experts, bf16"],
)
def test_tensors_are_those_that_llama_cpps_converter_writes(
    kept: list[int] | None, dtype: str, converters: str, tmp_path: Path
) -> None:
    """The digests are of files written by convert_hf_to_gguf.py --outtype bf16 of llama-cpp-python 0.3.36
    from these two checkpoints."""
    prune("example:tiny", tmp_path / "in", lambda model: plan_keeping(kept, model), store=dtype)
    export_gguf(tmp_path / "in", tmp_path / "out.gguf")
    assert digest(read(tmp_path / "out.gguf")) == converters


def test_both_spellings_of_a_config_give_the_same_metadata(tmp_path: Path) -> None:
    result = []
    for layout in ("bf16", "resaved"):
        source = write_checkpoint(tmp_path / layout, layout=layout)
        export_gguf(source, tmp_path / f"{layout}.gguf", tokenizer=False, name="same")
        result.append(read(tmp_path / f"{layout}.gguf").metadata)
    assert result[0] == result[1]


def test_bf16_that_came_from_mxfp4_goes_back_without_loss(tmp_path: Path) -> None:
    shape = SHAPES["beyond a chunk"]
    source = write_checkpoint(tmp_path / "in", shape, "bf16")
    result = export_gguf(source, tmp_path / "out.gguf", store="mxfp4", tokenizer=False)
    assert result.conversion is not None
    weights = 3 * shape.experts * shape.hidden * shape.intermediate
    assert (result.conversion.blocks, result.conversion.inexact_blocks) == (weights // 32, 0)
    assert_holds(read(tmp_path / "out.gguf"), make_tensors(shape, "mxfp4"))


def test_other_bf16_is_rounded_as_prune_rounds_it_and_the_loss_reported(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        name = "model.layers.0.mlp.experts.down_proj"
        tensors[name] = random_bf16(np.random.default_rng(3), tensors[name].shape)

    source = write_checkpoint(tmp_path / "in", layout="bf16", edit_tensors=edit)
    result = export_gguf(source, tmp_path / "out.gguf", store="mxfp4", tokenizer=False)
    pruned = prune(source, tmp_path / "pruned", lambda m: plan_keeping(None, m), store="mxfp4")
    assert pruned.outcome is not None
    assert pruned.outcome.conversion is not None
    assert result.conversion is not None
    assert result.conversion.inexact_blocks == pruned.outcome.conversion["inexact_blocks"] != 0
    assert float(f"{result.conversion.relative_error:.6g}") == pruned.outcome.conversion["relative_error"]
    assert_holds(read(tmp_path / "out.gguf"), load_tensors(tmp_path / "pruned"))


def test_a_tied_head_is_written_out(tmp_path: Path) -> None:
    source = write_checkpoint(
        tmp_path / "in",
        edit_tensors=lambda t: t.pop("lm_head.weight"),
        edit_config=lambda c: c.update(tie_word_embeddings=True),
    )
    export_gguf(source, tmp_path / "out.gguf", tokenizer=False)
    tensors = make_tensors(Shape())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    assert_holds(read(tmp_path / "out.gguf"), tensors)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_dense_weights_of_other_types_keep_their_precision(dtype: type, tmp_path: Path) -> None:
    names = ("model.embed_tokens.weight", "model.norm.weight", "model.layers.1.self_attn.q_proj.bias")
    values: Tensors = {}

    def edit(tensors: Tensors) -> None:
        for name in names:
            values[name] = np.random.default_rng(1).normal(size=tensors[name].shape).astype(dtype)
        tensors.update(values)

    source = write_checkpoint(tmp_path / "in", edit_tensors=edit)
    export_gguf(source, tmp_path / "out.gguf", tokenizer=False)
    got = read(tmp_path / "out.gguf")
    for name, target in zip(
        names, ("token_embd.weight", "output_norm.weight", "blk.1.attn_q.bias"), strict=True
    ):
        assert got.values(target).tobytes() == values[name].astype(np.float32).tobytes()
    assert got.tensors["token_embd.weight"][0] == {2: "F16", 4: "F32"}[np.dtype(dtype).itemsize]


def test_a_file_without_tokenizer_says_so(tmp_path: Path) -> None:
    export_gguf("example:tiny", tmp_path / "out.gguf", tokenizer=False)
    got = read(tmp_path / "out.gguf").metadata
    assert {k: v for k, v in got.items() if k.startswith("tokenizer.")} == {"tokenizer.ggml.model": "none"}
    assert got["gpt-oss.vocab_size"] == 2048


@pytest.mark.parametrize(
    ("edit", "expected_text"),
    [
        ({"swiglu_limit": 5.0}, "swiglu_limit is 5, but llama.cpp hard-codes 7"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types do not alternate"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types do not alternate"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.0}},
            "attention_factor is not YaRN's default",
        ),
    ],
)
def test_a_model_that_llama_cpp_would_compute_differently_is_refused(
    edit: dict[str, object], expected_text: str, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "in", edit_config=lambda c: c.update(edit))
    with pytest.raises(InvalidInputError) as caught:
        export_gguf(source, tmp_path / "out.gguf", tokenizer=False)
    assert expected_text in str(caught.value)
    assert not (tmp_path / "out.gguf").exists()


def test_attention_without_biases_is_refused(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        for name in [n for n in tensors if "_proj.bias" in n]:
            del tensors[name]

    source = write_checkpoint(
        tmp_path / "in", edit_tensors=edit, edit_config=lambda c: c.update(attention_bias=False)
    )
    with pytest.raises(InvalidInputError, match="attention_bias is false"):
        export_gguf(source, tmp_path / "out.gguf", tokenizer=False)


def refuse(error: type[MoeSurgeryError], expected_text: str, source: Path, **options: object) -> None:
    with pytest.raises(error, match=expected_text):
        export_gguf(source, source.with_name("out.gguf"), tokenizer=False, **options)  # type: ignore[arg-type]


def test_plans_and_types_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in")

    def plan(layers: Sequence[Sequence[int]], experts: int = 4) -> Plan:
        return Plan("gpt_oss", experts, tuple(map(tuple, layers)))

    expected_text = (
        "keeps between 1 and 2 experts per layer, but a GGUF file of the architecture gpt-oss has one number"
    )
    refuse(PlanMismatchError, expected_text, source, plan=plan([[0], [0, 1]]))
    refuse(PlanMismatchError, "5 experts", source, plan=plan([[0], [0]], experts=5))
    refuse(PlanMismatchError, "layers", source, plan=plan([[0]]))
    refuse(UsageError, "`store` bf16: choose one of keep, mxfp4", source, store="bf16")
    narrow = write_checkpoint(tmp_path / "narrow", Shape(hidden=48, intermediate=40), "bf16")
    refuse(UsageError, "48 columns, not a multiple of 32", narrow, store="mxfp4")
