"""A decode step never reads a value back from its device: it runs even on the meta device, which has none.

Tensors on the `meta` device have shapes and dtypes and nothing else, so whatever depends on a value
(`item`, `tolist`, `nonzero`, a mask used as an index) raises there. It is not a CPU, so the runtime
takes the way it takes on an accelerator.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

from moe_surgery import Plan, load_model  # noqa: E402
from moe_surgery.kernels.reference.attention import attention, visible  # noqa: E402
from moe_surgery.kernels.reference.experts import experts_gathered, experts_grouped  # noqa: E402
from moe_surgery.kernels.reference.route import route  # noqa: E402
from moe_surgery.runtime.model import CausalLM  # noqa: E402
from moe_surgery.runtime.sampling import Sampling, distribution  # noqa: E402
from tests.runtime.conftest import SMALL, WINDOW  # noqa: E402
from tests.runtime.models import write_lively  # noqa: E402
from tests.support.pairwise import pairwise_cover  # noqa: E402

PLANS = {"full": None, "view": Plan("gpt_oss", SMALL.experts, ((4, 0), (1, 2), (3, 2)))}


def moved(value: Any, device: str) -> Any:
    """`value` with every tensor in it on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)})
    return value


def on_meta(model: CausalLM) -> CausalLM:
    return CausalLM(
        model.config,
        moved(model.embedding, "meta"),
        [moved(layer, "meta") for layer in model.layers],
        moved(model.norm, "meta"),
        moved(model.unembedding, "meta"),
        model.dtype,
        model.backend,
    )


@pytest.mark.parametrize(
    ("layout", "plan", "dtype"),
    pairwise_cover(("mxfp4", "bf16"), tuple(PLANS), (torch.float32, torch.bfloat16, torch.float16)),
)
def test_a_decode_step_depends_on_no_value(
    layout: str, plan: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = write_lively(tmp_path / "model", SMALL, layout)
    model = on_meta(load_model(folder, dtype=dtype, plan=PLANS[plan], backend="reference"))
    cache = model.new_cache(2, 50, rollback=3)
    token = torch.zeros(2, 1, dtype=torch.int64, device="meta")
    for _ in range(WINDOW + 5):  # around the ring
        logits = model(token, cache)
        assert (logits.shape, logits.dtype) == ((2, 1, SMALL.vocabulary), torch.float32)
        token = logits[:, -1].argmax(-1, keepdim=True)
    cache.truncate(cache.length - 3)
    model(token, cache)


@pytest.mark.parametrize("mask", [None, torch.ones(2, 4, dtype=torch.int64, device="meta")])
def test_a_short_padded_prefill_depends_on_no_value(small: Path, mask: torch.Tensor | None) -> None:
    model = on_meta(load_model(small, backend="reference"))
    ids = torch.zeros(2, 4, dtype=torch.int64, device="meta")
    assert model(ids, model.new_cache(2, 10), mask).shape == (2, 4, SMALL.vocabulary)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.5), Sampling(0.5, 5, 0.9, 0.1)])
def test_a_distribution_depends_on_no_value(sampling: Sampling) -> None:
    assert distribution(torch.zeros(2, 9, device="meta"), sampling).shape == (2, 9)


def test_the_grouped_way_does_depend_on_values(small: Path) -> None:
    layer = on_meta(load_model(small, dtype=torch.float32, backend="reference")).layers[0]
    x = torch.zeros(1, SMALL.hidden, device="meta")
    ids, weights = route(x, layer.router.weight, layer.router.bias, 2)
    with pytest.raises((NotImplementedError, RuntimeError)):
        experts_grouped(x, ids, weights, layer.experts)


@pytest.mark.parametrize("layout", ["mxfp4", "bf16"])
def test_route_experts_and_attention_trace_with_static_shapes(layout: str, tmp_path: Path) -> None:
    layer = load_model(write_lively(tmp_path / "model", SMALL, layout), dtype=torch.float32).layers[0]
    router = layer.router
    experts_gathered(*chosen(layer, 1), layer.experts)  # makes the decoding table, once per device

    def step(x: torch.Tensor, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        ids, weights = route(x, router.weight, router.bias, layer.top_k)
        y = experts_gathered(x, ids, weights, layer.experts)
        seen = visible(positions, positions.expand(-1, k.shape[2]), WINDOW)
        return attention(q, k, k, layer.sinks, seen).sum() + y.sum()

    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1, SMALL.hidden)
        q = torch.empty(1, SMALL.heads, 1, SMALL.head_dim)
        k = torch.empty(1, SMALL.kv_heads, 7, SMALL.head_dim)
        traced = make_fx(step, _allow_non_fake_inputs=True)(x, q, k, torch.empty(1, 1, dtype=torch.int64))
    targets = {str(node.target) for node in traced.graph.nodes if node.op == "call_function"}
    assert "aten.bmm.default" in targets
    assert not [t for t in targets if "_local_scalar_dense" in t or "nonzero" in t or "unique" in t]


def chosen(layer: Any, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.ones(tokens, SMALL.hidden)
    return (x, *route(x, layer.router.weight, layer.router.bias, layer.top_k))
