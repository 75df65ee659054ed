"""All layers in one call of the extension against the same layers one operation at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from moe_surgery import inspect, load_model, plan_random  # noqa: E402
from moe_surgery.kernels.interface import SHORT_STEP  # noqa: E402
from moe_surgery.kernels.native import NativeBackend  # noqa: E402
from moe_surgery.kernels.weights import Layer, Projection  # noqa: E402
from moe_surgery.runtime.model import CausalLM  # noqa: E402
from moe_surgery.runtime.view import view  # noqa: E402
from tests.kernels.native_cases import VARIANTS, every_variant, native, needs_native  # noqa: E402

pytestmark = needs_native

# Scalar kernels take most of the time, and one test below runs a stack of them.
variants_in_time = pytest.mark.parametrize(
    "isa", [pytest.param(isa, marks=[pytest.mark.slow] if isa == "scalar" else []) for isa in VARIANTS]
)


class OneByOne(NativeBackend):
    """The native kernels without a stack."""

    def fuse_layers(self, layers: object, shape: object) -> None:
        return None


def model_of(folder: Path, isa: str, threads: int, *, stacked: bool) -> CausalLM:
    model = load_model(folder, dtype=torch.float32, backend="native")
    model.backend = native(isa, threads) if stacked else OneByOne(isa, 1)
    assert (model._fused_layers() is not None) == stacked
    return model


def draw_ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, 500, (batch, tokens), generator=torch.Generator().manual_seed(batch))


def outcome(model: CausalLM, batch: int, prompt: int = 140, step: int = 512) -> list[torch.Tensor]:
    """Logits and caches of a prompt with padding, read in steps of `step`, of steps of one and several tokens, and a
    rollback."""
    ids, cache, result = draw_ids(batch, prompt + 30), model.new_cache(batch, 300), []
    mask = torch.ones(batch, prompt, dtype=torch.int64)
    mask[0, :3] = 0
    for start in range(0, prompt, step):
        stop = min(prompt, start + step)
        result.append(model(ids[:, start:stop], cache, mask[:, :stop] if start == 0 else None))
    for start, stop in ((0, 1), (1, 6), (6, 7), (7, 23), (23, 30)):
        result.append(model(ids[:, prompt + start : prompt + stop], cache))
        if stop == 6:
            cache.truncate([prompt + 5 - row for row in range(batch)])
    return [*result, *cache.keys, *cache.values, *cache.positions.values()]


def prompt_length(isa: str) -> int:
    """Longer than the window of 64 with the 30 tokens that follow; scalar kernels are slow."""
    return 35 if isa == "scalar" else 140


@every_variant
@pytest.mark.parametrize("batch", [1, 3])
def test_a_stack_gives_what_its_layers_give(tiny: Path, isa: str, batch: int) -> None:
    if isa == "scalar" and batch > 1:
        pytest.skip("scalar kernels are slow, and cut the work alike")
    prompt = prompt_length(isa)
    expected = outcome(model_of(tiny, isa, 1, stacked=False), batch, prompt)
    result = outcome(model_of(tiny, isa, 2, stacked=True), batch, prompt)
    assert len(result) == len(expected)
    for actual, theirs in zip(result, expected, strict=True):
        assert torch.equal(actual, theirs)


@pytest.mark.parametrize(("kept", "top_k"), [(3, None), (31, 1), (None, 2)])
def test_a_view_has_a_stack_of_its_own(tiny: Path, kept: int | None, top_k: int | None) -> None:
    plan = None if kept is None else plan_random(kept, 1, inspect(tiny))
    whole, plain = (model_of(tiny, "", 2, stacked=stacked) for stacked in (True, False))
    before = outcome(whole, 2)
    for actual, expected in zip(
        outcome(view(whole, plan, top_k), 2), outcome(view(plain, plan, top_k), 2), strict=True
    ):
        assert torch.equal(actual, expected)
    for actual, expected in zip(outcome(whole, 2), before, strict=True):
        assert torch.equal(actual, expected)


def cast(layer: Layer, dtype: torch.dtype) -> Layer:
    """The layer with everything but its packed experts stored in another dtype."""

    def of(p: Projection) -> Projection:
        return Projection(p.weight.to(dtype), None if p.bias is None else p.bias.to(dtype))

    e = layer.experts
    experts = replace(e, gate_up_bias=e.gate_up_bias.to(dtype), down_bias=e.down_bias.to(dtype))
    projections = {name: of(getattr(layer, name)) for name in ("q", "k", "v", "o", "router")}
    vectors = {name: getattr(layer, name).to(dtype) for name in ("attention_norm", "mlp_norm", "sinks")}
    return replace(layer, experts=experts, **projections, **vectors)


def stored_as(model: CausalLM, dtype: torch.dtype) -> CausalLM:
    model.layers = [cast(layer, dtype) for layer in model.layers]
    model.embedding, model.norm, model.unembedding = (
        t.to(dtype) for t in (model.embedding, model.norm, model.unembedding)
    )
    return model


@variants_in_time
def test_a_stack_of_f32_weights_gives_what_bf16_ones_with_the_same_values_give(tiny: Path, isa: str) -> None:
    batch, prompt = 1 if isa == "scalar" else 2, prompt_length(isa)
    step = SHORT_STEP  # in longer ones only products of BF16 weights are tiled
    expected = outcome(model_of(tiny, isa, 1, stacked=True), batch, prompt, step)
    for stacked in (True, False):
        model = stored_as(model_of(tiny, isa, 1, stacked=stacked), torch.float32)
        assert (model._fused_layers() is not None) == stacked
        for actual, theirs in zip(outcome(model, batch, prompt, step), expected, strict=True):
            assert torch.equal(actual, theirs)


@variants_in_time
def test_a_stack_of_f16_weights_gives_what_f32_ones_with_the_same_values_give(tiny: Path, isa: str) -> None:
    half = stored_as(model_of(tiny, isa, 2, stacked=True), torch.float16)
    assert half._fused_layers() is not None
    batch, prompt = 1 if isa == "scalar" else 2, prompt_length(isa)
    result = outcome(half, batch, prompt)
    apart = stored_as(model_of(tiny, isa, 1, stacked=False), torch.float16)
    for actual, expected in zip(result, outcome(apart, batch, prompt), strict=True):
        assert torch.equal(actual, expected)
    for actual, expected in zip(result, outcome(stored_as(half, torch.float32), batch, prompt), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
def test_with_f16_and_f32_weights_a_sequence_gets_in_a_batch_what_it_gets_alone(
    tiny: Path, dtype: torch.dtype, compute: torch.dtype
) -> None:
    model = stored_as(load_model(tiny, dtype=compute, backend="native"), dtype)
    ids = draw_ids(5, SHORT_STEP)
    together = model(ids)
    for row in range(5):
        assert torch.equal(model(ids[row : row + 1])[0], together[row])
        cache = model.new_cache(1, SHORT_STEP)
        steps = [
            model(ids[row : row + 1, a:b], cache) for a, b in ((0, 7), (7, 8), (8, 11), (11, SHORT_STEP))
        ]
        assert torch.equal(torch.cat(steps, dim=1)[0], together[row])


def strided_index(layer: Layer) -> Layer:
    rows = torch.arange(len(layer.router.weight))
    return replace(layer, experts=replace(layer.experts, expert_map=torch.stack([rows, rows], 1)[:, 0]))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: replace(layer, o=replace(layer.o, weight=layer.o.weight.double())),
        lambda layer: replace(layer, sinks=layer.sinks.double()),
        lambda layer: replace(layer, mlp_norm=layer.mlp_norm.double()),
        lambda layer: replace(layer, router=replace(layer.router, bias=layer.router.bias.double())),
        lambda layer: replace(layer, attention_norm=layer.attention_norm[:-1]),
        strided_index,
    ],
    ids=["o", "sinks", "norm", "router's bias", "short norm", "strided expert map"],
)
def test_weights_of_another_kind_have_no_stack(tiny: Path, change: object) -> None:
    model = model_of(tiny, "", 1, stacked=True)
    model.layers = [*model.layers[:-1], change(model.layers[-1])]  # type: ignore[operator]
    assert model._fused_layers() is None


def test_other_dtypes_and_single_layers_have_no_stack(tiny: Path) -> None:
    assert load_model(tiny, dtype=torch.bfloat16, backend="native")._fused_layers() is None
    assert load_model(tiny, dtype=torch.float32, backend="native", one_layer=True)._fused_layers() is None
