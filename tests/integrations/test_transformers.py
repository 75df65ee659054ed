"""transformers computes the same logits with our experts as with its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.integrations.moe", reason="this transformers has no experts interface")

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from moe_surgery import plan_keeping, plan_random, prune  # noqa: E402
from moe_surgery.checkpoint.resolve import resolve  # noqa: E402
from moe_surgery.errors import PlanMismatchError, UsageError  # noqa: E402
from moe_surgery.integrations.transformers import PackedMLP, register, replace_experts  # noqa: E402
from tests.support import oracle  # noqa: E402
from tests.support.checkpoints import Shape, write_checkpoint  # noqa: E402

pytestmark = pytest.mark.xdist_group("integrations")

TOLERANCE = 1e-2  # of logits up to 24: the native backend rounds activations to 16 bits of a block's largest
TOKENS = torch.randint(0, 2048, (2, 70), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=[32, 8, 3])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, whole and pruned."""
    tiny = resolve("example:tiny")
    if request.param == 32:
        return tiny
    pruned = tmp_path_factory.mktemp("pruned") / str(request.param)
    prune(tiny, pruned, lambda model: plan_random(request.param, 0, model))
    return pruned


@pytest.fixture
def model(folder: Path):
    """In float32, with transformers' eager experts."""
    register()
    model = oracle.load_model(folder)
    model.set_experts_implementation("eager")
    return model


def test_one_argument_gives_the_same_logits(model) -> None:
    expected = oracle.logits_of(model, TOKENS)
    register()  # twice is as good as once
    model.set_experts_implementation("moe_surgery")
    calls = count_calls(model)
    result = oracle.logits_of(model, TOKENS)
    assert calls == [len(model.model.layers)]
    torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCE)
    one = oracle.logits_of(model, TOKENS[:1, :1])
    model.set_experts_implementation("eager")
    torch.testing.assert_close(one, oracle.logits_of(model, TOKENS[:1, :1]), rtol=0, atol=TOLERANCE)


def test_packed_experts_give_the_same_logits(model, folder: Path) -> None:
    expected = oracle.logits_of(model, TOKENS)
    dense = sum(p.nbytes for p in model.model.layers.parameters())
    assert replace_experts(model, folder) is model
    torch.testing.assert_close(oracle.logits_of(model, TOKENS), expected, rtol=0, atol=TOLERANCE)
    experts = model.model.layers[0].mlp.experts
    assert experts.gate_up_proj_blocks.dtype == torch.uint8
    kept = sum(t.nbytes for t in (*model.model.layers.parameters(), *model.model.layers.buffers()))
    assert kept < dense / 2
    assert not any("experts" in name for name, _ in model.named_parameters())


def test_packed_experts_generate_the_same_tokens(model, folder: Path) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    expected = model.generate(TOKENS[:, :10], **options)
    replace_experts(model, folder)
    assert torch.equal(model.generate(TOKENS[:, :10], **options), expected)


def test_the_routers_logits_can_still_be_recorded(model, folder: Path) -> None:
    with torch.no_grad():
        expected = model(TOKENS, output_router_logits=True).router_logits
        result = replace_experts(model, folder)(TOKENS, output_router_logits=True).router_logits
    assert len(result) == len(expected) == 4
    for one, other in zip(result, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)


def count_calls(model) -> list[int]:
    """A list whose one number counts how often our operator runs in this model's experts."""
    import moe_surgery.integrations.ops as ops

    calls = [0]
    backend = ops.backend_of("cpu")
    original = backend.experts

    def counted(*arguments):
        calls[0] += 1
        return original(*arguments)

    backend.experts = counted  # type: ignore[method-assign]
    return calls


@pytest.fixture(autouse=True)
def uncounted():
    yield
    import moe_surgery.integrations.ops as ops

    ops.backend_of.cache_clear()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "small", Shape(), "mxfp4")


def test_bf16_checkpoints_load_with_one_argument(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "bf16", Shape(), "bf16")
    register()
    ours = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="moe_surgery", attn_implementation="eager"
    )
    assert ours.config._experts_implementation == "moe_surgery"
    expected = oracle.logits_of(oracle.load_model(folder), TOKENS % 24)
    torch.testing.assert_close(oracle.logits_of(ours.eval(), TOKENS % 24), expected, rtol=0, atol=TOLERANCE)
    with pytest.raises(UsageError, match="not packed in MXFP4"):
        replace_experts(ours, folder)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("packed", [True, False])
def test_the_moe_layer_compiles_into_one_graph(small: Path, packed: bool, backend: str) -> None:
    register()
    model = oracle.load_model(small)
    model.set_experts_implementation("moe_surgery")
    if packed:
        replace_experts(model, small)
    mlp = model.model.layers[1].mlp
    x = torch.randn(2, 5, 64)
    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(mlp, backend=backend, fullgraph=True)(x)[0]
        torch.testing.assert_close(result, mlp(x)[0], rtol=0, atol=1e-6)


def test_the_whole_model_compiles_into_one_graph(small: Path) -> None:
    register()
    model = replace_experts(oracle.load_model(small), small)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        result = compiled(TOKENS[:, :9] % 24, use_cache=False).logits
    torch.testing.assert_close(result, oracle.logits_of(model, TOKENS[:, :9] % 24), rtol=0, atol=TOLERANCE)


def test_replaced_twice_is_replaced(small: Path) -> None:
    model = oracle.load_model(small)
    expected = oracle.logits_of(model, TOKENS % 24)
    replace_experts(replace_experts(model, small), small)
    assert isinstance(model.model.layers[0].mlp, PackedMLP)
    torch.testing.assert_close(oracle.logits_of(model, TOKENS % 24), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (Shape(layers=3), "3 layers, the model has 2"),
        (Shape(experts=3), "3 experts of width 64; the model's layer 0 routes to 4 of width 64"),
        (Shape(hidden=96), "4 experts of width 96; the model's layer 0 routes to 4 of width 64"),
    ],
)
def test_another_checkpoint_is_refused(shape: Shape, message: str, small: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", shape, "mxfp4")
    model = oracle.load_model(small)
    with pytest.raises(PlanMismatchError, match=message):
        replace_experts(model, other)
    assert not isinstance(model.model.layers[0].mlp, PackedMLP)


def test_another_kind_of_model_is_refused(small: Path) -> None:
    with pytest.raises(UsageError, match="the model is Linear, not gpt_oss"):
        replace_experts(torch.nn.Linear(2, 2), small)


def test_experts_of_another_form_are_refused() -> None:
    register()
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, vocab_size=24,
        decoder_sparse_step=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, experts_implementation="moe_surgery")
    with pytest.raises(UsageError, match="has no biases; choose another implementation"):
        model(torch.zeros(1, 3, dtype=torch.int64))


def test_another_gate_is_refused(small: Path) -> None:
    register()
    model = oracle.load_model(small)
    model.set_experts_implementation("moe_surgery")
    experts = model.model.layers[0].mlp.experts
    other = type("OtherExperts", (type(experts),), {"_apply_gate": lambda self, h: h[..., ::2]})
    experts.__class__ = other
    with pytest.raises(UsageError, match="OtherExperts has another activation"):
        oracle.logits_of(model, TOKENS % 24)


def test_nothing_else_needs_importing_first(tmp_path: Path) -> None:
    """As the README has it, in a process in which nothing of the package has been imported."""
    folder = tmp_path / "small"
    prune("example:tiny", folder, lambda model: plan_keeping([0, 1], model), store="bf16")
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "from moe_surgery.integrations.transformers import register\n"
        "register()\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], experts_implementation='moe_surgery')\n"
        "assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()\n"
    )
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
