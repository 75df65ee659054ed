"""Keys of config.json that have two spellings, or may lie in two places, mean what transformers' GptOssConfig reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import GptOssConfig, GptOssForCausalLM  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

from moe_surgery import Checkpoint, identify_model, inspect, load_model, plan_keeping, prune  # noqa: E402
from moe_surgery.errors import CheckpointWarning, InvalidInputError  # noqa: E402
from moe_surgery.families.model_config import ModelConfig  # noqa: E402
from moe_surgery.runtime.rope import inverse_frequencies  # noqa: E402
from tests.runtime.models import Config, write_lively  # noqa: E402
from tests.support import oracle  # noqa: E402
from tests.support.checkpoints import Shape, load_config, write_checkpoint  # noqa: E402

SHAPE = Shape(layers=2, experts=6, top_k=3, head_dim=64)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
GONE = object()


def edited(**values: object) -> Callable[[Config], None]:
    """Set keys; those set to GONE are removed."""

    def edit(config: Config) -> None:
        for key, value in values.items():
            config.pop(key, None)
            if value is not GONE:
                config[key] = value

    return edit


# What is edited, and what the note says where there is one.
READ: dict[str, tuple[dict[str, object], str | None]] = {
    "num_experts_per_tok changed": (
        {"num_experts_per_tok": 1},
        "num_experts_per_tok is 1 but experts_per_token is 3; transformers and moe-surgery use num_experts_per_tok",
    ),
    "num_experts_per_tok raised to all experts": (
        {"num_experts_per_tok": 6},
        "is 6 but experts_per_token is 3",
    ),
    "experts_per_token changed": ({"experts_per_token": 5}, "is 3 but experts_per_token is 5"),
    "experts_per_token is null": ({"experts_per_token": None}, "is 3 but experts_per_token is null"),
    "experts_per_token alone": (
        {"num_experts_per_tok": GONE},
        "experts_per_token is 3, num_experts_per_tok is missing; transformers and moe-surgery use "
        "num_experts_per_tok 4",
    ),
    "no top-k": (
        {"num_experts_per_tok": GONE, "experts_per_token": GONE},
        "num_experts_per_tok is missing; transformers and moe-surgery use num_experts_per_tok 4",
    ),
    "both top-ks alike": ({}, None),
    "num_experts alone": ({"num_local_experts": GONE, "num_experts": 6}, None),
    "num_experts beside another num_local_experts": (
        {"num_local_experts": 9, "num_experts": 6},
        "num_experts is 6 but num_local_experts is 9; transformers and moe-surgery use num_experts",
    ),
    "no head_dim": ({"head_dim": GONE}, None),
    "no rope": ({"rope_scaling": GONE, "rope_theta": GONE}, None),
    "rope_parameters alone": (
        {"rope_scaling": GONE, "rope_theta": GONE, "rope_parameters": {**YARN, "rope_theta": 300.0}},
        None,
    ),
    "rope_scaling is null": ({"rope_scaling": None, "rope_parameters": {**YARN, "rope_theta": 300.0}}, None),
    "rope_scaling beside other rope_parameters": (
        {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
        "rope_scaling and rope_parameters differ; transformers and moe-surgery use rope_scaling",
    ),
    "rope_scaling beside the same rope_parameters": ({"rope_scaling": YARN, "rope_parameters": YARN}, None),
    "rope_theta inside and outside": (
        {"rope_scaling": {**YARN, "rope_theta": 300.0}, "rope_theta": 500},
        None,
    ),
    "type for rope_type": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}},
        None,
    ),
    "no original length": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, None),
    "no original length and no context": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": GONE},
        None,
    ),
    "original length outside": ({"rope_scaling": YARN, "original_max_position_embeddings": 64}, None),
    "initial_context_length is not read": ({"initial_context_length": 77}, None),
    "mscale": ({"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}, None),
    "mscale alone": ({"rope_scaling": {**YARN, "mscale": 2.0}}, None),
    "attention_factor beside mscale": (
        {"rope_scaling": {**YARN, "attention_factor": 1.5, "mscale": 1.0, "mscale_all_dim": 0.5}},
        None,
    ),
    "dtype beside torch_dtype": ({"dtype": "float16"}, None),
}
ATTRIBUTES = (
    "num_hidden_layers",
    "num_local_experts",
    "num_experts_per_tok",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)


def reference_config(folder: Path) -> GptOssConfig:
    return GptOssConfig.from_pretrained(folder)


@pytest.mark.parametrize("case", READ)
@pytest.mark.filterwarnings("ignore::moe_surgery.errors.CheckpointWarning")
def test_the_same_config_is_read_alike(case: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "in", SHAPE, edit_config=edited(**READ[case][0]))
    expected = reference_config(folder)
    with Checkpoint.open(folder) as checkpoint:
        got = ModelConfig.of(identify_model(checkpoint))
    for name in ATTRIBUTES:
        assert getattr(got, name) == getattr(expected, name), name
    rope = expected.rope_parameters
    assert got.rope_parameters.rope_theta == rope["rope_theta"]
    if rope["rope_type"] == "default":
        assert got.rope_parameters.factor == 1
        return
    frequencies, scale = ROPE_INIT_FUNCTIONS["yarn"](expected)
    torch.testing.assert_close(
        inverse_frequencies(got.rope_parameters, got.head_dim), frequencies, rtol=1e-6, atol=0
    )
    assert got.rope_parameters.attention_factor == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("case", READ)
def test_a_contradiction_is_one_note(case: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    edits, expected_note = READ[case]
    folder = write_checkpoint(tmp_path / "in", SHAPE, edit_config=edited(**edits))
    load_model(folder)
    notes = [str(w.message) for w in recwarn if issubclass(w.category, CheckpointWarning)]
    assert len(notes) == (expected_note is not None)
    for note in notes:
        assert "config.json: " in note
        assert str(expected_note) in note
        assert note.isprintable()
    if expected_note is not None and "rope" not in case:
        assert inspect(folder).notes == tuple(notes)


# What is edited, and what transformers says to that.
REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "num_experts_per_tok is null": ({"num_experts_per_tok": None}, "'num_experts_per_tok' expected int"),
    "num_experts_per_tok is a fraction": ({"num_experts_per_tok": 2.0}, "'num_experts_per_tok' expected int"),
    "head_dim is null": ({"head_dim": None}, "'head_dim' expected int"),
    "num_key_value_heads is null": ({"num_key_value_heads": None}, "'num_key_value_heads' expected int"),
    "yarn without a factor": ({"rope_scaling": {"rope_type": "yarn"}}, "factor"),
    "a rope for each kind of layer": (
        {
            "rope_scaling": GONE,
            "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), YARN),
        },
        "rope_type",
    ),
    "a top-k for a layer": (
        {"per_layer_config": {"0": {"num_experts_per_tok": 2}}},
        "'num_experts_per_tok' is a per-layer attribute",
    ),
    "experts for a layer": (
        {"per_layer_config": {"1": {"num_local_experts": 4}}},
        "'num_local_experts' is a per-layer attribute",
    ),
}


def build(folder: Path) -> None:
    """Let transformers make a model of the config in `folder`."""
    config = reference_config(folder)
    with torch.device("meta"):
        GptOssForCausalLM(config)


@pytest.mark.parametrize("case", REFUSED)
def test_what_transformers_cannot_run_is_refused(case: str, tmp_path: Path) -> None:
    build(write_checkpoint(tmp_path / "usual", SHAPE))
    edits, expected_note = REFUSED[case]
    folder = write_checkpoint(tmp_path / "in", SHAPE, edit_config=edited(**edits))
    with pytest.raises(Exception, match=expected_note):
        build(folder)
    with pytest.raises(InvalidInputError, match=r"config\.json: "):
        load_model(folder)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_what_a_user_of_transformers_changed_is_what_runs(top_k: int, backend: str, tmp_path: Path) -> None:
    folder = write_lively(tmp_path / "in", SHAPE)
    before = oracle.load_model(folder)
    config = reference_config(folder)
    config.num_experts_per_tok = top_k
    config.save_pretrained(folder)
    assert load_config(folder)["experts_per_token"] == SHAPE.top_k
    tokens = torch.randint(0, SHAPE.vocabulary, (1, 60), generator=torch.Generator().manual_seed(0))
    expected = oracle.logits_of(oracle.load_model(folder), tokens)
    assert (expected - oracle.logits_of(before, tokens)).abs().max() > 0.01
    with pytest.warns(CheckpointWarning, match="num_experts_per_tok"):
        model = load_model(folder, dtype=torch.float32, backend=backend)
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=2e-3 if backend == "native" else 1e-4)

    with pytest.warns(CheckpointWarning):
        prune(folder, tmp_path / "out", lambda m: plan_keeping(None, m))
    written = load_config(tmp_path / "out")
    assert (written["num_experts_per_tok"], written["experts_per_token"]) == (top_k, top_k)
    again = oracle.logits_of(oracle.load_model(tmp_path / "out"), tokens)
    assert torch.equal(again, expected)


@pytest.mark.filterwarnings("ignore::moe_surgery.errors.CheckpointWarning")
def test_a_pruned_config_says_one_top_k_however_the_source_said_it(tmp_path: Path) -> None:
    for number, (edits, _) in enumerate(READ.values()):
        source = write_checkpoint(tmp_path / f"in{number}", SHAPE, edit_config=edited(**edits))
        out = tmp_path / f"out{number}"
        prune(source, out, lambda m: plan_keeping([0, 2, 3, 5], m))
        config, written = reference_config(out), load_config(out)
        expected = min(4, reference_config(source).num_experts_per_tok)
        assert (config.num_local_experts, config.num_experts_per_tok) == (4, expected)
        assert {written.get(k, expected) for k in ("num_experts_per_tok", "experts_per_token")} == {expected}
        assert {written.get(k, 4) for k in ("num_experts", "num_local_experts")} == {4}


def test_the_original_layout_follows_openais_own_keys(tmp_path: Path) -> None:
    edit = edited(num_experts_per_tok=1, num_local_experts=9)
    folder = write_checkpoint(tmp_path / "in", SHAPE, "original", edit_config=edit)
    with pytest.warns(CheckpointWarning, match="use (num_experts|experts_per_token)$") as notes:
        result = inspect(folder)
    assert (result.experts, result.top_k) == (SHAPE.experts, SHAPE.top_k)
    assert [str(n.message).partition("config.json: ")[2] for n in notes] == [
        "num_experts is 6 but num_local_experts is 9; OpenAI's code and moe-surgery use num_experts",
        "experts_per_token is 3 but num_experts_per_tok is 1; OpenAI's code and moe-surgery use experts_per_token",
    ]
    with pytest.warns(CheckpointWarning):
        prune(folder, tmp_path / "out", lambda m: plan_keeping(None, m))
    assert (
        reference_config(tmp_path / "out").num_local_experts,
        reference_config(tmp_path / "out").num_experts_per_tok,
    ) == (
        6,
        3,
    )


@pytest.mark.parametrize("file", [{"eos_token_id": [5, 7]}, {"eos_token_id": 5}, None], ids=str)
def test_stop_tokens_are_those_of_transformers_generate(file: object, tmp_path: Path) -> None:
    """generation_config.json goes before config.json."""
    from moe_surgery.checkpoint.resolve import resolve
    from moe_surgery.runtime.text import Text

    shape = replace(SHAPE, layers=1, head_dim=8)
    folder = write_checkpoint(tmp_path / "in", shape, edit_config=edited(eos_token_id=9))
    (folder / "generation_config.json").unlink()
    if file is not None:
        (folder / "generation_config.json").write_text(json.dumps(file))
    (folder / "tokenizer.json").write_bytes((resolve("example:tiny") / "tokenizer.json").read_bytes())
    expected = oracle.load_model(folder).generation_config.eos_token_id
    ours = Text(folder).stop_tokens or load_model(folder).config.eos_token_ids
    assert list(ours) == (expected if isinstance(expected, list) else [expected])
