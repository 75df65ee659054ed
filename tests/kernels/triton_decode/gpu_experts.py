"""The Triton backend and what is built on it, on a real device only: BF16 tensor cores, graphs, compilation.

`make gpu` runs this; the interpreter cannot.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_surgery.integrations import ops
from moe_surgery.kernels.interface import Backend
from moe_surgery.kernels.reference import ReferenceBackend
from moe_surgery.kernels.triton import TritonBackend
from moe_surgery.kernels.weights import DenseWeight, ExpertWeights, Mxfp4Weight, Weight
from tests.kernels.triton.cases import Case, covering_cases, layer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available")
DEVICE = torch.device("cuda")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def moved(experts: ExpertWeights) -> ExpertWeights:
    def weight(w: Weight) -> Weight:
        if isinstance(w, DenseWeight):
            return DenseWeight(w.values.to(DEVICE))
        return Mxfp4Weight(w.blocks.to(DEVICE), w.scales.to(DEVICE))

    return replace(
        experts,
        gate_up=weight(experts.gate_up),
        gate_up_bias=experts.gate_up_bias.to(DEVICE),
        down=weight(experts.down),
        down_bias=experts.down_bias.to(DEVICE),
        expert_map=None if experts.expert_map is None else experts.expert_map.to(DEVICE),
    )


def error(case: Case, dtype: torch.dtype, hidden: int = 96, units: int = 32) -> float:
    given = layer(case, hidden, units, dtype, scales=(119, 122))
    tensors = (t.to(DEVICE) for t in (given.x, given.ids, given.weights))
    result = TritonBackend().experts(*tensors, moved(given.experts))
    exact = torch.from_numpy(given.expected())
    return float((result.double().cpu() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("case", covering_cases(), ids=str)
def test_experts_of_every_kind(case: Case) -> None:
    assert error(case, torch.bfloat16) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", covering_cases()[:6], ids=str)
def test_experts_in_other_types(case: Case, dtype: torch.dtype) -> None:
    assert error(case, dtype) <= TOLERANCE[dtype]


@pytest.mark.parametrize("format", ["mxfp4", "dense"])
@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 16, 64, 300])
def test_experts_of_both_ways_at_the_width_of_gpt_oss(tokens: int, format: str) -> None:
    assert error(Case(5, 4, tokens, format, True), torch.bfloat16, 2880, 2880) <= 2e-2


@pytest.mark.parametrize("experts", [4, 8, 16, 31, 32, 128])
@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_route_at_the_width_of_gpt_oss(tokens: int, experts: int) -> None:
    random = torch.Generator(DEVICE).manual_seed(0)
    x, weight = (torch.randint(-2, 3, (n, 2880), generator=random, device=DEVICE) for n in (tokens, experts))
    bias = torch.randint(-1, 2, (experts,), generator=random, device=DEVICE)
    given = x.bfloat16(), weight.bfloat16(), bias.bfloat16(), 4  # sums are exact, so ties are too
    ids, weights = TritonBackend().route(*given)
    expected = ReferenceBackend().route(*given)
    assert torch.equal(ids, expected[0])
    torch.testing.assert_close(weights, expected[1], rtol=1e-2, atol=1e-4)


def test_a_captured_layer_follows_its_input() -> None:
    given = layer(Case(5, 2, 3, "mxfp4", False), dtype=torch.bfloat16)
    experts, x, weights = moved(given.experts), given.x.to(DEVICE), given.weights.to(DEVICE)
    router, bias = (
        torch.randn(5, x.shape[1], device=DEVICE).bfloat16(),
        torch.zeros(5, device=DEVICE).bfloat16(),
    )

    def run(backend: Backend) -> torch.Tensor:
        ids, weights = backend.route(x, router, bias, 2)
        return backend.experts(x, ids, weights, experts)

    del weights
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(TritonBackend())
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = run(TritonBackend())
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        expected = run(TritonBackend())
        assert torch.equal(result, expected)


def test_transformers_on_the_device(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from moe_surgery.integrations.transformers import register, replace_experts
    from tests.support.checkpoints import Shape, write_checkpoint

    register()
    folder = write_checkpoint(tmp_path / "small", Shape(), "mxfp4")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=transformers.Mxfp4Config(dequantize=True),
        experts_implementation="eager",
    )
    model = model.to(DEVICE).eval()
    ids = torch.arange(20, device=DEVICE)[None] % 24
    ops.backend_of.cache_clear()
    with torch.no_grad():
        expected = model(ids).logits
        model.set_experts_implementation("moe_surgery")
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-3)
        replace_experts(model, folder)
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-3)
        assert ops.backend_of("cuda").name == "triton"
        compiled = torch.compile(model.model.layers[0].mlp, fullgraph=True)
        x = torch.randn(1, 5, 64, device=DEVICE)
        torch.testing.assert_close(compiled(x)[0], model.model.layers[0].mlp(x)[0], rtol=1e-4, atol=1e-4)
