"""Dimensions in config.json: positive integers, consistent with each other and with the tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from moe_surgery import inspect, plan_keeping, prune
from moe_surgery.errors import InvalidInputError
from tests.families.refusal import refusal
from tests.support.checkpoints import (
    Shape,
    Tensors,
    assert_same_tensors,
    load_config,
    load_tensors,
    make_config,
    make_tensors,
    write_checkpoint,
    write_folder,
)

SHAPE = Shape(layers=1)
Config = dict[str, object]


CONFIGS: Mapping[str, tuple[Callable[[Config], object], str]] = {
    "another model": (
        lambda c: c.update(model_type="dbrx"),
        "is a dbrx checkpoint (GptOssForCausalLM); supported model_type: gpt_oss",
    ),
    "a model type over two lines": (
        lambda c: c.update(model_type="a\n\x1b[31mb"),
        r"is a a\n\x1b[31mb checkpoint",
    ),
    "a model type that is a number": (
        lambda c: c.update(model_type=5),
        "model_type is 5; supported model_type",
    ),
    "more experts than tensors": (lambda c: c.update(num_local_experts=5), "shape [4, 64], expected [5, 64]"),
    "fewer experts than tensors": (
        lambda c: c.update(num_local_experts=3),
        "shape [4, 64], expected [3, 64]",
    ),
    "more layers than tensors": (lambda c: c.update(num_hidden_layers=2), "'model.layers.1."),
    "too many layers": (lambda c: c.update(num_hidden_layers=10**9), "1000000000 layers; at most 10000"),
    "too many experts": (lambda c: c.update(num_local_experts=1025), "1025 experts; at most 1024"),
    "top-k above the experts": (
        lambda c: c.update(num_experts_per_tok=5, experts_per_token=5),
        "top-k 5 is more than the 4 experts",
    ),
    "an alias that the tensors contradict": (
        lambda c: c.update(num_experts=5),
        "shape [4, 64], expected [5, 64]",
    ),
    "an alias that is true": (
        lambda c: c.update(num_experts=True),
        "num_experts is true, not a positive integer",
    ),
    "layers of different sizes": (
        lambda c: c.update(block_configs=[{"ffn": {"num_local_experts": 4}}]),
        "block_configs configures layers individually, which is not supported",
    ),
    "another model type with layers of different sizes": (
        lambda c: c.update(model_type="gpt_oss_puzzle", block_configs=[{"num_local_experts": 4}]),
        "is a gpt_oss_puzzle checkpoint (GptOssForCausalLM); supported model_type: gpt_oss",
    ),
    "layers configured one by one": (
        lambda c: c.update(per_layer_config={"0": {"num_experts_per_tok": 1}}),
        "per_layer_config configures layers individually, which is not supported",
    ),
    "more rows in the vocabulary": (lambda c: c.update(vocab_size=25), "'model.embed_tokens.weight'"),
    "no attention bias where there is one": (
        lambda c: c.update(attention_bias=False),
        "(unexpected tensors: 4)",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_contradicts_itself_or_the_tensors_is_refused(case: str, tmp_path: Path) -> None:
    edit, expected = CONFIGS[case]
    assert expected in refusal(write_checkpoint(tmp_path / "in", SHAPE, edit_config=edit))


NUMBERS = {
    "true": (True, "true"),
    "a fraction": (4.0, "4.0"),
    "negative": (-4, "-4"),
    "zero": (0, "0"),
    "null": (None, "null"),
    "quoted": ("4", "the string '4'"),
    "a list": ([4], "an array of 1"),
}
KEYS = [
    (layout, key)
    for layout in ("mxfp4", "original")
    for key, value in make_config(SHAPE, layout).items()
    if key.startswith(("num_", "hidden_size", "intermediate", "head_dim", "vocab", "experts_per"))
    and isinstance(value, int)
    and (layout, key) != ("mxfp4", "experts_per_token")  # which is not read
]


@pytest.mark.parametrize(("layout", "key"), KEYS)
@pytest.mark.parametrize("number", NUMBERS)
def test_a_dimension_that_is_no_positive_integer_is_named(
    layout: str, key: str, number: str, tmp_path: Path
) -> None:
    value, text = NUMBERS[number]
    source = write_checkpoint(tmp_path / "in", SHAPE, layout, edit_config=lambda c: c.update({key: value}))
    assert refusal(source) == f"{source}/config.json: {key} is {text}, not a positive integer"


@pytest.mark.parametrize(("layout", "key"), KEYS)
def test_a_missing_dimension_is_named_unless_another_spelling_or_a_default_says_it(
    layout: str, key: str, tmp_path: Path
) -> None:
    shape = replace(SHAPE, head_dim=64)
    source = write_checkpoint(tmp_path / "in", shape, layout, edit_config=lambda c: c.pop(key))
    if key in ("head_dim", "num_experts_per_tok"):
        inspect(source)
    else:
        both = {
            "num_experts": "'num_experts' or 'num_local_experts'",
            "num_local_experts": "'num_experts' or 'num_local_experts'",
            "experts_per_token": "'experts_per_token' or 'num_experts_per_tok'",
        }
        assert refusal(source) == f"{source}/config.json: key {both.get(key, repr(key))} is missing"


@pytest.mark.parametrize("content", ["", "[]", "null", "{", '{"a": 1, "a": 2}', '{"a": NaN}', "\ufeff{}"])
def test_a_config_that_is_no_json_object_is_refused(content: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", SHAPE)
    (source / "config.json").write_text(content)
    assert str(source / "config.json") in refusal(source)


ODD_NUMBERS = (
    "initial_context_length",
    "rope_scaling_factor",
    "rope_ntk_alpha",
    "rope_theta",
    "swiglu_limit",
)


@pytest.mark.parametrize("key", ODD_NUMBERS)
@pytest.mark.parametrize("value", [None, "32", True, [1], -1, 10**18])
def test_the_original_layouts_numbers_are_checked_before_they_are_translated(
    key: str, value: object, tmp_path: Path
) -> None:
    source = write_checkpoint(
        tmp_path / "in", SHAPE, "original", edit_config=lambda c: c.update({key: value})
    )
    with pytest.raises(InvalidInputError, match=rf"config\.json: {key} is .*, not a number above 0"):
        prune(source, tmp_path / "out", lambda m: plan_keeping(None, m))
    assert not (tmp_path / "out").exists()


# --- what is allowed


def test_tied_embeddings_need_no_lm_head(tmp_path: Path) -> None:
    source = write_checkpoint(
        tmp_path / "in",
        SHAPE,
        edit_tensors=lambda tensors: tensors.pop("lm_head.weight"),
        edit_config=lambda c: c.update(tie_word_embeddings=True),
    )
    prune(source, tmp_path / "out", lambda m: plan_keeping([0, 2], m))
    assert "lm_head.weight" not in load_tensors(tmp_path / "out")
    assert load_config(tmp_path / "out")["tie_word_embeddings"] is True
    full = inspect(write_checkpoint(tmp_path / "untied", SHAPE))
    assert inspect(source).parameters == full.parameters - SHAPE.vocabulary * SHAPE.hidden


def test_attention_without_bias_needs_no_bias_tensors(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        for name in [n for n in tensors if "self_attn" in n and n.endswith("bias")]:
            del tensors[name]

    source = write_checkpoint(
        tmp_path / "in",
        SHAPE,
        edit_tensors=edit,
        edit_config=lambda c: c.update(attention_bias=False),
    )
    prune(source, tmp_path / "out", lambda m: plan_keeping(None, m))
    assert_same_tensors(load_tensors(tmp_path / "out"), load_tensors(source))


@pytest.mark.parametrize("layout", ["mxfp4", "bf16", "resaved"])
def test_a_config_without_a_model_type_is_recognised_by_its_tensors(layout: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", SHAPE, layout, edit_config=lambda c: c.pop("model_type"))
    assert inspect(source).model_type == "gpt_oss"


@pytest.mark.parametrize(
    ("spelling", "value"),
    [("num_experts", 4), ("num_local_experts", 4)],
)
def test_either_spelling_of_the_expert_count_will_do_in_either_layout(
    spelling: str, value: int, tmp_path: Path
) -> None:
    for layout in ("mxfp4", "original"):

        def edit(config: Config) -> None:
            config.pop("num_experts", None)
            config.pop("num_local_experts", None)
            config[spelling] = value

        source = write_checkpoint(tmp_path / layout, SHAPE, layout, edit_config=edit)
        prune(source, tmp_path / f"{layout}-out", lambda m: plan_keeping([1, 2], m))
        assert inspect(tmp_path / f"{layout}-out").experts == 2


def test_the_original_layout_without_defaults_gets_those_of_gpt_oss(tmp_path: Path) -> None:
    shape = replace(SHAPE, head_dim=64)
    required = {
        "num_hidden_layers": 1,
        "num_experts": 4,
        "experts_per_token": 2,
        "vocab_size": 24,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    source = write_folder(tmp_path / "in", make_tensors(shape, "original"), required)
    prune(source, tmp_path / "out", lambda m: plan_keeping(None, m))
    config = load_config(tmp_path / "out")
    assert (config["head_dim"], config["sliding_window"], config["swiglu_limit"]) == (64, 128, 7.0)
    assert config["rope_theta"] == 150000
    assert config["rope_scaling"] == {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    }
    assert config["max_position_embeddings"] == 131072
