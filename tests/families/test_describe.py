"""A checkpoint is described whole or refused in one line that names the file or the tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe_surgery import Checkpoint, describe, inspect, plan_keeping, prune
from moe_surgery.errors import InvalidInputError
from tests.support.checkpoints import (
    LAYOUTS,
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
EXPERTS = "model.layers.0.mlp.experts."
ROUTER = "model.layers.0.mlp.router."


def refusal(folder: Path) -> str:
    """The one line with which `folder` is refused."""
    with pytest.raises(InvalidInputError) as caught:
        inspect(folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert message.isprintable()
    assert caught.value.exit_code == 3
    return message


def broken(tmp_path: Path, layout: str, edit: Callable[[Tensors], object], shape: Shape = SHAPE) -> str:
    return refusal(write_checkpoint(tmp_path / "in", shape, layout, shards=2, edit_tensors=edit))


# --- every tensor

TENSORS = [(layout, name) for layout in LAYOUTS for name in make_tensors(SHAPE, layout)]


@pytest.mark.parametrize(("layout", "name"), TENSORS)
def test_a_missing_tensor_is_named(layout: str, name: str, tmp_path: Path) -> None:
    told = broken(tmp_path, layout, lambda tensors: tensors.pop(name))
    # Hub weights may be stored in two ways; where neither is there, the first is named.
    wanted = f"{name}_blocks" if name.endswith(("gate_up_proj", "down_proj")) else name
    if name == "embedding.weight":  # by this one the original layout is recognised
        assert "config.json: model_type null is not supported; known: gpt_oss" in told
    else:
        assert f"tensor '{wanted}' is in no shard" in told


def other_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every axis one longer and one shorter, an axis more and, where there is more than one, less."""
    changed = [(*shape[:i], n + d, *shape[i + 1 :]) for i, n in enumerate(shape) for d in (1, -1)]
    return [*changed, (*shape, 1), *([shape[1:]] if len(shape) > 1 else [])]


@pytest.mark.parametrize(("layout", "name"), TENSORS)
def test_a_tensor_of_another_shape_is_named_with_both_shapes(layout: str, name: str, tmp_path: Path) -> None:
    value = make_tensors(SHAPE, layout)[name]
    for number, shape in enumerate(other_shapes(value.shape)):
        told = broken(
            tmp_path / str(number),
            layout,
            lambda tensors, s=shape: tensors.update({name: np.zeros(s, value.dtype)}),  # type: ignore[misc]
        )
        assert f"tensor '{name}': shape {list(shape)}, expected {list(value.shape)} from config.json" in told


@pytest.mark.parametrize(("layout", "name"), TENSORS)
def test_a_tensor_of_another_dtype_is_named(layout: str, name: str, tmp_path: Path) -> None:
    value = make_tensors(SHAPE, layout)[name]
    weight = name.endswith(("gate_up_proj", "down_proj")) or (layout == "resaved" and "_blocks" in name)
    if name.endswith(("blocks", "scales")) and not weight:
        wrong, told = np.float32, ["dtype F32, expected"]
    elif weight:
        wrong, told = np.float32, ["dtype F32, expected BF16"]
    else:
        wrong, told = np.uint8, ["dtype U8, expected BF16 or F16 or F32"]
    message = broken(tmp_path, layout, lambda t: t.update({name: np.zeros(value.shape, wrong)}))
    assert f"tensor '{name}': {told[0]}" in message


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_tensors_outside_the_expert_weights_may_be_of_any_float(
    layout: str, dtype: type, tmp_path: Path
) -> None:
    def widen(tensors: Tensors) -> None:
        for name, value in tensors.items():
            if "proj_blocks" not in name and not name.endswith(("gate_up_proj", "down_proj")):
                tensors[name] = value if value.dtype == np.uint8 else (value >> 8).astype(dtype)

    source = write_checkpoint(tmp_path / "in", SHAPE, layout, edit_tensors=widen)
    prune(source, tmp_path / "out", lambda m: plan_keeping(None, m))
    got = load_tensors(tmp_path / "out")
    assert got["model.norm.weight"].dtype == got[ROUTER + "bias"].dtype == dtype


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name",
    ["lm_head.bias", "model.layers.1.mlp.router.weight", "model.layers.0.mlp.experts.up_proj", ""],
)
def test_a_surplus_tensor_is_named(layout: str, name: str, tmp_path: Path) -> None:
    told = broken(tmp_path, layout, lambda tensors: tensors.update({name: np.zeros(3, np.uint16)}))
    assert f"tensor '{name}': a gpt_oss model of 1 layers has no such tensor (1 surplus in all)" in told


def test_control_characters_of_a_surplus_name_are_escaped(tmp_path: Path) -> None:
    name = "a\x1b[2J\nb\u202e"
    told = broken(tmp_path, "mxfp4", lambda tensors: tensors.update({name: np.zeros(3, np.uint16)}))
    assert r"a\x1b[2J\nb\u202e" in told.replace("\\\\", "\\")


# --- blocks and scales


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def reshape(name: str, *shape: int) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: np.zeros(shape, tensors[name].dtype)})


# gate_up_proj_blocks is [4, 64, 2, 16], down_proj_blocks [4, 64, 1, 16].
DISAGREEING: Mapping[str, tuple[Callable[[Tensors], object], str]] = {
    "no scales": (drop(EXPERTS + "gate_up_proj_scales"), f"'{EXPERTS}gate_up_proj_scales' is in no shard"),
    "scales without blocks": (drop(EXPERTS + "down_proj_blocks"), f"'{EXPERTS}down_proj_blocks' is in no"),
    "a scale for two blocks": (
        reshape(EXPERTS + "gate_up_proj_scales", 4, 64, 1),
        "gate_up_proj_scales': shape [4, 64, 1], expected [4, 64, 2]",
    ),
    "scales with an axis of blocks": (
        reshape(EXPERTS + "gate_up_proj_scales", 4, 64, 2, 1),
        "gate_up_proj_scales': shape [4, 64, 2, 1], expected [4, 64, 2]",
    ),
    "blocks of 8 bytes": (
        reshape(EXPERTS + "gate_up_proj_blocks", 4, 64, 4, 8),
        "gate_up_proj_blocks': shape [4, 64, 4, 8], expected [4, 64, 2, 16]",
    ),
    "blocks without their last axis": (
        reshape(EXPERTS + "down_proj_blocks", 4, 64, 16),
        "down_proj_blocks': shape [4, 64, 16], expected [4, 64, 1, 16]",
    ),
    "fewer experts in the router's weight": (
        reshape(ROUTER + "weight", 3, 64),
        "router.weight': shape [3, 64], expected [4, 64]",
    ),
    "more experts in the router's bias": (
        reshape(ROUTER + "bias", 5),
        "router.bias': shape [5], expected [4]",
    ),
    "fewer experts in blocks": (
        reshape(EXPERTS + "gate_up_proj_blocks", 3, 64, 2, 16),
        "gate_up_proj_blocks': shape [3, 64, 2, 16], expected [4, 64, 2, 16]",
    ),
    "fewer experts in scales": (
        reshape(EXPERTS + "down_proj_scales", 3, 64, 1),
        "down_proj_scales': shape [3, 64, 1], expected [4, 64, 1]",
    ),
    "fewer experts in a bias": (
        reshape(EXPERTS + "down_proj_bias", 3, 64),
        "down_proj_bias': shape [3, 64], expected [4, 64]",
    ),
    "weights stored twice": (
        lambda tensors: tensors.update({EXPERTS + "down_proj": np.zeros((4, 32, 64), np.uint16)}),
        f"'{EXPERTS}down_proj': a gpt_oss model of 1 layers has no such tensor",
    ),
}


@pytest.mark.parametrize("case", DISAGREEING)
def test_blocks_scales_and_counts_that_disagree_are_named(case: str, tmp_path: Path) -> None:
    edit, told = DISAGREEING[case]
    assert told in broken(tmp_path, "mxfp4", edit)


def test_a_layer_with_other_experts_than_the_rest_is_named(tmp_path: Path) -> None:
    few = make_tensors(Shape(layers=2, experts=3))

    def edit(tensors: Tensors) -> None:
        tensors.update({k: v for k, v in few.items() if k.startswith("model.layers.1.mlp.")})

    told = broken(tmp_path, "mxfp4", edit, Shape(layers=2))
    assert "tensor 'model.layers.1.mlp.router.weight': shape [3, 64], expected [4, 64]" in told


def test_expert_weights_stored_in_two_ways_are_refused_naming_one_of_each(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        for suffix in ("_blocks", "_scales"):
            del tensors[EXPERTS + "down_proj" + suffix]
        tensors[EXPERTS + "down_proj"] = np.zeros((4, 32, 64), np.uint16)

    told = broken(tmp_path, "mxfp4", edit)
    assert f"'{EXPERTS}gate_up_proj_blocks' is stored otherwise than" in told
    assert f"tensor '{EXPERTS}down_proj': expert weights must be all MXFP4 or all BF16" in told


def test_blocks_that_no_dimension_fills_are_refused(tmp_path: Path) -> None:
    told = broken(tmp_path, "mxfp4", lambda tensors: None, replace(SHAPE, hidden=48))
    assert f"tensor '{EXPERTS}gate_up_proj_blocks': 48 columns are not whole MXFP4 blocks of 32" in told


def test_scales_may_lie_in_another_shard_than_their_blocks(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", SHAPE, shards=60)
    prune(source, tmp_path / "out", lambda m: plan_keeping(None, m))
    assert_same_tensors(load_tensors(tmp_path / "out"), load_tensors(source))


# --- config.json

Config = dict[str, object]
CONFIGS: Mapping[str, tuple[Callable[[Config], object], str]] = {
    "another model": (
        lambda c: c.update(model_type="mixtral"),
        "model_type the string 'mixtral' is not supported; known: gpt_oss",
    ),
    "a model type over two lines": (
        lambda c: c.update(model_type="a\n\x1b[31mb"),
        r"model_type the string 'a\n\x1b[31mb' is not supported",
    ),
    "a model type that is a number": (lambda c: c.update(model_type=5), "model_type 5 is not supported"),
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
    "two top-ks": (
        lambda c: c.update(num_experts_per_tok=1),
        "num_experts_per_tok is 1 but experts_per_token is 2; they must be equal",
    ),
    "two expert counts": (
        lambda c: c.update(num_experts=5),
        "num_local_experts is 4 but num_experts is 5; they must be equal",
    ),
    "a second spelling that is true": (
        lambda c: c.update(num_experts_per_tok=1, experts_per_token=True),
        "experts_per_token is true, not a positive integer",
    ),
    "a second spelling that is a fraction": (
        lambda c: c.update(experts_per_token=2.0),
        "experts_per_token is 2.0, not a positive integer",
    ),
    "more rows in the vocabulary": (lambda c: c.update(vocab_size=25), "'model.embed_tokens.weight'"),
    "tied embeddings beside an lm_head": (
        lambda c: c.update(tie_word_embeddings=True),
        "tensor 'lm_head.weight': a gpt_oss model of 1 layers has no such tensor",
    ),
    "no attention bias where there is one": (
        lambda c: c.update(attention_bias=False),
        "has no such tensor (4 surplus in all)",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_contradicts_itself_or_the_tensors_is_refused(case: str, tmp_path: Path) -> None:
    edit, told = CONFIGS[case]
    assert told in refusal(write_checkpoint(tmp_path / "in", SHAPE, edit_config=edit))


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
]


@pytest.mark.parametrize(("layout", "key"), KEYS)
@pytest.mark.parametrize("number", NUMBERS)
def test_a_dimension_that_is_no_positive_integer_is_named(
    layout: str, key: str, number: str, tmp_path: Path
) -> None:
    value, shown = NUMBERS[number]
    source = write_checkpoint(tmp_path / "in", SHAPE, layout, edit_config=lambda c: c.update({key: value}))
    assert refusal(source) == f"{source}/config.json: {key} is {shown}, not a positive integer"


@pytest.mark.parametrize(("layout", "key"), KEYS)
def test_a_missing_dimension_is_named_unless_another_spelling_or_a_default_says_it(
    layout: str, key: str, tmp_path: Path
) -> None:
    shape = replace(SHAPE, head_dim=64)
    source = write_checkpoint(tmp_path / "in", shape, layout, edit_config=lambda c: c.pop(key))
    said_elsewhere = layout == "mxfp4" and key in ("num_experts_per_tok", "experts_per_token")
    if said_elsewhere or key == "head_dim":
        assert inspect(source).top_k == shape.top_k
    else:
        hub_key = {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
        assert refusal(source) == f"{source}/config.json: key {hub_key.get(key, key)!r} is missing"


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
        edit_tensors=drop("lm_head.weight"),
        edit_config=lambda c: c.update(tie_word_embeddings=True),
    )
    prune(source, tmp_path / "out", lambda m: plan_keeping([0, 2], m))
    assert "lm_head.weight" not in load_tensors(tmp_path / "out")
    assert load_config(tmp_path / "out")["tie_word_embeddings"] is True
    full = inspect(write_checkpoint(tmp_path / "untied", SHAPE))
    assert inspect(source).parameters == full.parameters - SHAPE.vocabulary * SHAPE.hidden


def test_attention_without_bias_needs_none(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_described_as_one_model(layout: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", Shape(), layout, shards=3)
    with Checkpoint.open(source) as checkpoint:
        model = describe(checkpoint)
    assert (model.layers, model.experts, model.top_k) == (2, 4, 2)
    assert model.storage == ("mxfp4" if layout in ("mxfp4", "original") else "bf16")
    shapes = {t.name: t.shape for t in model.tensors}
    assert len(shapes) == 2 * 17 + 3
    assert shapes["model.layers.1.mlp.experts.gate_up_proj"] == (4, 64, 64)
    assert shapes["model.layers.1.mlp.experts.down_proj"] == (4, 64, 32)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (16, 64)
