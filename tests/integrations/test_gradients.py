"""Gradients through our experts are those of the arithmetic: gradcheck in float64, and transformers' own."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.integrations.moe", reason="this transformers has no experts interface")

from moe_surgery.checkpoint.resolve import resolve  # noqa: E402
from moe_surgery.integrations import ops  # noqa: E402
from moe_surgery.integrations.transformers import register, replace_experts  # noqa: E402
from moe_surgery.kernels import select_backend  # noqa: E402
from moe_surgery.kernels.reference.experts import swiglu  # noqa: E402
from moe_surgery.kernels.reference.experts_backward import swiglu_backward  # noqa: E402
from tests.integrations.operands import EXPERTS, HIDDEN, TOP_K, inputs, operator  # noqa: E402
from tests.support import oracle  # noqa: E402
from tests.support.checkpoints import Shape, write_checkpoint  # noqa: E402

pytestmark = pytest.mark.xdist_group("integrations")


def leaves(arguments: tuple[object, ...], *indices: int) -> list[torch.Tensor]:
    """The arguments at `indices`, which get gradients."""
    return [arguments[i].requires_grad_() for i in indices]


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("packed", [True, False])
def test_experts_pass_gradcheck(packed: bool, tokens: int) -> None:
    arguments = list(inputs(tokens, packed, torch.float64))
    which = (0, 2, 5, 8) if packed else (0, 2, 3, 4, 5, 6)
    chosen = leaves(tuple(arguments), *which)

    def call(*values: torch.Tensor) -> torch.Tensor:
        for index, value in zip(which, values, strict=True):
            arguments[index] = value
        return operator(packed)(*arguments)

    assert torch.autograd.gradcheck(call, chosen, fast_mode=True)


def test_route_passes_gradcheck() -> None:
    random = torch.Generator().manual_seed(3)
    shapes = (3, HIDDEN), (EXPERTS, HIDDEN), (EXPERTS,)
    tensors = [torch.randn(s, generator=random, dtype=torch.float64).requires_grad_() for s in shapes]
    assert torch.autograd.gradcheck(lambda *t: torch.ops.moe_surgery.route(*t, TOP_K)[1], tensors)


@pytest.mark.parametrize("limit", [0.5, 7.0])
def test_the_gate_has_the_derivative_that_autograd_finds(limit: float) -> None:
    random = torch.Generator().manual_seed(4)
    h = (3 * torch.randn(5, 16, generator=random, dtype=torch.float64)).requires_grad_()
    outer = torch.randn(5, 8, generator=random, dtype=torch.float64)
    (expected,) = torch.autograd.grad(swiglu(h, limit, 1.702), h, outer)
    torch.testing.assert_close(swiglu_backward(outer, h.detach(), limit, 1.702), expected)


@pytest.mark.parametrize("packed", [True, False])
def test_operators_stay_sound_with_gradients(packed: bool) -> None:
    """Schema, fake implementation, and autograd traced with static and with symbolic shapes."""
    arguments = inputs(4, packed)
    leaves(arguments, *((0, 2, 5, 8) if packed else (0, 2, 3, 4, 5, 6)))
    torch.library.opcheck(operator(packed), arguments)


@pytest.mark.parametrize("packed", [True, False])
def test_nothing_is_kept_without_gradients(packed: bool) -> None:
    arguments = inputs(2, packed)
    assert operator(packed)(*arguments).grad_fn is None
    leaves(arguments, 0)
    with torch.no_grad():
        assert operator(packed)(*arguments).grad_fn is None


@pytest.fixture(scope="module", params=["tiny", "random"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "tiny":
        return resolve("example:tiny")
    return write_checkpoint(tmp_path_factory.mktemp("random") / "in", Shape(), "mxfp4")


def gradients(model, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(got: torch.Tensor, expected: torch.Tensor, name: str, tolerance: float) -> None:
    """Relative to the largest."""
    assert (got - expected).abs().max() <= tolerance * expected.abs().max() + 1e-9, name


TOLERANCE = {"reference": 1e-4, "native": 2e-2}  # native rounds activations to 16 bits on the way forward


@pytest.mark.parametrize("backend", TOLERANCE)
@pytest.mark.parametrize("packed", [True, False])
def test_gradients_are_those_of_transformers(
    folder: Path, packed: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = select_backend(torch.device("cpu"), backend)
    monkeypatch.setattr(ops, "backend_of", lambda device_type: chosen)
    register()
    model = oracle.load_model(folder).train()
    model.set_experts_implementation("eager")
    tokens = torch.randint(0, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = gradients(model, tokens)
    if packed:
        replace_experts(model, folder)
        experts = [layer.mlp.experts for layer in model.model.layers]
        for module in experts:
            module.gate_up_proj_bias.requires_grad_()
            module.down_proj_bias.requires_grad_()
    else:
        model.set_experts_implementation("moe_surgery")
    got = gradients(model, tokens)
    assert set(expected) - set(got) == ({n for n in expected if ".mlp.experts." in n} if packed else set())
    for name, value in got.items():
        assert_close(value, expected[name], name, TOLERANCE[backend])
    if packed:
        for layer, module in enumerate(experts):
            for leaf in ("gate_up_proj_bias", "down_proj_bias"):
                name = f"model.layers.{layer}.mlp.experts.{leaf}"
                # The buffer is BF16, and so is its gradient.
                assert_close(
                    getattr(module, leaf).grad.float(), expected[name], name, TOLERANCE[backend] + 2**-8
                )


def test_a_training_step_compiles(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "in", Shape(), "mxfp4")
    model = replace_experts(oracle.load_model(folder), folder)
    mlp = model.model.layers[1].mlp
    x = torch.randn(2, 5, 64, requires_grad=True)
    (expected,) = torch.autograd.grad(mlp(x)[0].square().sum(), x)
    torch._dynamo.reset()
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    (got,) = torch.autograd.grad(compiled(x)[0].square().sum(), x)
    torch.testing.assert_close(got, expected)
