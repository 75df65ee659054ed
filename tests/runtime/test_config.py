"""config.json means to the runtime what it means to transformers, and nonsense in it is one clear line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from moe_surgery import Checkpoint, identify_model, load_model  # noqa: E402
from moe_surgery.errors import InvalidInputError  # noqa: E402
from moe_surgery.families.model_config import ModelConfig  # noqa: E402
from moe_surgery.kernels.reference import ReferenceBackend  # noqa: E402
from tests.runtime.models import Config, write_lively  # noqa: E402
from tests.support import oracle  # noqa: E402
from tests.support.checkpoints import Shape, Tensors  # noqa: E402

SHAPE = Shape(layers=3)
TOKENS = torch.randint(0, SHAPE.vocabulary, (1, 90), generator=torch.Generator().manual_seed(0))
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


def no_attention_bias(tensors: Tensors) -> None:
    for name in [n for n in tensors if "self_attn" in n and n.endswith(".bias")]:
        del tensors[name]


def setting(**values: object) -> Callable[[Config], None]:
    return lambda config: config.update(values)


def without(*keys: str) -> Callable[[Config], None]:
    return lambda config: [config.pop(key) for key in keys] and None


EDITS: dict[str, Callable[[Config], object]] = {
    "window": setting(sliding_window=9),
    "all layers slide": setting(layer_types=["sliding_attention"] * 3),
    "no layer slides": setting(layer_types=["full_attention"] * 3),
    "windows in another order": setting(layer_types=["full_attention", *["sliding_attention"] * 2]),
    "swiglu": setting(swiglu_limit=0.5, swiglu_alpha=3.0),
    "epsilon": setting(rms_norm_eps=0.5),
    "theta": setting(rope_theta=500.0),
    "rope unsaid": without("rope_scaling", "rope_theta"),
    "plain rope": setting(rope_scaling={"rope_type": "default"}),
    "yarn by default": setting(rope_scaling=YARN),
    "yarn, cut off": setting(rope_scaling={**YARN, "truncate": True, "beta_fast": 8.0, "beta_slow": 2.0}),
    "yarn with its own scale": setting(rope_scaling={**YARN, "attention_factor": 0.8}),
    "new spelling": setting(rope_parameters={**YARN, "rope_theta": 300.0}, rope_scaling=None),
    "one expert a token": setting(num_experts_per_tok=1, experts_per_token=1),
}


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    folder = tmp_path_factory.mktemp("config") / "usual"
    return oracle.logits_of(oracle.load_model(write_lively(folder, SHAPE)), TOKENS)


def check(folder: Path, usual: torch.Tensor) -> None:
    expected = oracle.logits_of(oracle.load_model(folder), TOKENS)
    assert (expected - usual).abs().max() > 2e-3
    got = load_model(folder, dtype=torch.float32, backend="reference")(TOKENS)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_changed_config_changes_the_model_as_in_transformers(
    edit: Callable[[Config], object], usual: torch.Tensor, tmp_path: Path
) -> None:
    check(write_lively(tmp_path / "model", SHAPE, edit_config=edit), usual)


def test_attention_without_biases_is_read(usual: torch.Tensor, tmp_path: Path) -> None:
    edit = setting(attention_bias=False)
    folder = write_lively(tmp_path / "model", SHAPE, edit_config=edit, edit_tensors=no_attention_bias)
    check(folder, usual)


def test_tied_embeddings_are_read(usual: torch.Tensor, tmp_path: Path) -> None:
    folder = write_lively(
        tmp_path / "model",
        SHAPE,
        edit_config=setting(tie_word_embeddings=True),
        edit_tensors=lambda tensors: tensors.pop("lm_head.weight"),
    )
    check(folder, usual)


def config_of(folder: Path, edit: Callable[[Config], object]) -> ModelConfig:
    """What the runtime makes of `folder` with its config.json edited."""
    with Checkpoint.open(folder) as checkpoint:
        model = identify_model(checkpoint)
    config = dict(model.config)
    edit(config)
    return ModelConfig.of(replace(model, config=config))


REFUSED = {
    "sliding_window": (0, "sliding_window is 0, not a number above 0"),
    "max_position_embeddings": (0.5, "max_position_embeddings is 0.5, not a whole number"),
    "rms_norm_eps": ("small", "rms_norm_eps is the string 'small', not a number above 0"),
    "swiglu_limit": (True, "swiglu_limit is true, not a number above 0"),
    "rope_theta": (1, "rope_theta is 1.0, not above 1"),
    "layer_types": (["full_attention"], "layer_types does not list 3 layers"),
    "rope_scaling": ("yarn", "rope_scaling is not an object"),
}


@pytest.mark.parametrize(("key", "value", "message"), [(k, *v) for k, v in REFUSED.items()])
def test_a_value_that_makes_no_sense_is_named(key: str, value: object, message: str, small: Path) -> None:
    with pytest.raises(InvalidInputError) as caught:
        config_of(small, setting(**{key: value}))
    assert str(caught.value).startswith(f"config.json: {message}")


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "linear"}, "rope_type is the string 'linear'; known: default, yarn"),
        ({"type": "yarn", "factor": None}, "factor is null"),
    ],
)
def test_a_rope_that_is_not_supported_is_named(rope: Config, message: str, small: Path) -> None:
    with pytest.raises(InvalidInputError, match=message):
        config_of(small, setting(rope_scaling=rope))


def test_an_unknown_kind_of_layer_is_named(small: Path) -> None:
    with pytest.raises(
        InvalidInputError, match="layer_types holds the string 'chunked'; known: sliding_attention, full"
    ):
        config_of(small, setting(layer_types=["full_attention", "chunked", "sliding_attention"]))


def test_without_sliding_layers_no_window_is_needed(small: Path) -> None:
    config = config_of(small, setting(layer_types=["full_attention"] * 3, sliding_window=None))
    assert config.sliding_windows == (None, None, None)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (Shape(heads=5, kv_heads=2), "5 attention heads are not a multiple of 2 key-value heads"),
        (Shape(head_dim=7), "head_dim is 7; rotary embedding needs an even number"),
    ],
)
def test_heads_that_cannot_be_are_named(shape: Shape, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=message):
        load_model(write_lively(tmp_path / "model", shape))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
rope_keys = ("rope_theta", "rope_type", "factor", "beta_fast", "beta_slow", "truncate", "attention_factor")


@given(
    top=st.dictionaries(
        st.sampled_from([*REFUSED, "swiglu_alpha", "eos_token_id", "rope_parameters"]), anything, max_size=3
    ),
    rope=st.dictionaries(st.sampled_from([*rope_keys, "original_max_position_embeddings"]), anything),
)
def test_any_config_is_either_refused_or_runs(small: Path, top: Config, rope: Config) -> None:
    from moe_surgery.runtime.rope import Rope

    try:
        config = config_of(small, lambda c: c.update({"rope_scaling": {**YARN, **rope}, **top}))
    except InvalidInputError as refused:
        error = str(refused)
    else:
        error = ""
    if error:
        assert error.startswith("config.json: ")
        assert error.isprintable()
        return
    assert all(w is None or w >= 1 for w in config.sliding_windows)
    cos, sin = Rope(config.rope_parameters, config.head_dim, torch.device("cpu"))(
        torch.arange(3), ReferenceBackend()
    )
    assert cos.isfinite().all()
    assert sin.isfinite().all()
