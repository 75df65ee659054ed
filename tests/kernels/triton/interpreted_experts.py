"""The experts' kernels in Triton's interpreter, against numpy float64 and the reference backend."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_surgery.errors import UsageError
from moe_surgery.kernels.reference import ReferenceBackend
from moe_surgery.kernels.triton import TritonBackend, backend
from moe_surgery.kernels.triton.moe_gemv import down_gemv, gate_up_gemv
from moe_surgery.kernels.triton.moe_grouped_gemm import combine, down_grouped_gemm, gate_up_grouped_gemm
from moe_surgery.kernels.triton.operands import operand
from moe_surgery.kernels.triton.routing_metadata import empty_routing, routing_launches
from moe_surgery.kernels.triton.tuning import SPLIT_K_CHOICES, Blocks, DeviceProps
from moe_surgery.kernels.weights import Mxfp4Weight
from tests.kernels.triton.cases import HIDDEN, INTERMEDIATE, Case, Layer, covering_cases, every_case, layer

# The interpreter runs programs one after the other. With so few multiprocessors only small launches are split.
DEVICE = DeviceProps(90, 8)
# Largest error in units of the largest output.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output buffers hold NaN, or a number that is not an index, until a kernel writes them."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -123456)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: poisoned(x.shape, dtype=x.dtype))


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_surgery.kernels.triton.tuning.get_device_props", lambda _: DEVICE)


def error(found: torch.Tensor, wanted: np.ndarray) -> float:
    assert found.isfinite().all()
    return float(np.abs(found.double().numpy() - wanted).max() / np.abs(wanted).max())


def check(case: Layer) -> None:
    result = TritonBackend().experts(case.x, case.ids, case.weights, case.experts)
    assert error(result, case.expected()) < TOLERANCE[case.x.dtype]
    reference = ReferenceBackend().experts(case.x, case.ids, case.weights, case.experts)
    assert error(result, reference.double().numpy()) < 2 * TOLERANCE[case.x.dtype]


@pytest.mark.parametrize("case", covering_cases((1, 3, 4, 8), (1, 2, 5, 17, 33)), ids=str)
def test_covering_cases(case: Case) -> None:
    check(layer(case))


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(33, 17, 1), (33, 17, 2)])
def test_a_top_k_beyond_the_models_own(experts: int, top_k: int, tokens: int) -> None:
    """One token: more slots than the kernel adds biases of at a time. Two: sorted, in tiles."""
    check(layer(Case(experts, top_k, tokens, "mxfp4", True)))


@pytest.mark.slow
@pytest.mark.parametrize("case", every_case(), ids=str)
def test_full_grid(case: Case) -> None:
    check(layer(case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [Case(5, 2, 1, "mxfp4", True), Case(3, 2, 9, "dense", False)], ids=str)
def test_narrow_inputs(case: Case, dtype: torch.dtype) -> None:
    check(layer(case, dtype=dtype))


@pytest.mark.parametrize("form", ["mxfp4", "dense"])
@pytest.mark.parametrize("tokens", [9, 17])
def test_all_tokens_on_one_expert(tokens: int, form: str) -> None:
    """The others get no token at all; tiles of 16 and 32 that are not full."""
    check(layer(Case(7, 1, tokens, form, True), ids=torch.full((tokens, 1), 4)))


def test_one_token_takes_two_launches_and_no_tokens_none() -> None:
    """With the one of `route`: three. Nothing sorts."""
    case = layer(Case(32, 4, 1, "mxfp4", False))
    out = torch.empty_like(case.x)
    launches = backend.experts_launches(case.x, case.ids, case.weights, case.experts, out)
    assert [launch.kernel.fn.__name__ for launch in launches] == ["_gate_up_gemv_kernel", "_down_gemv_kernel"]
    router = torch.randn(32, HIDDEN), torch.randn(32)
    assert len(backend.route_launches(case.x, *router, 4, case.ids, case.weights)) == 1
    none = case.x[:0], case.ids[:0], case.weights[:0]
    assert TritonBackend().experts(*none, case.experts).shape == (0, HIDDEN)
    assert TritonBackend().route(none[0], *router, 4)[0].shape == (0, 4)


def by_gemv(case: Layer, blocks: Blocks, splits: tuple[int, int], operands=None) -> torch.Tensor:
    up, down = operands or (
        operand(case.experts.gate_up, case.experts.gate_up_bias, "gate_up"),
        operand(case.experts.down, case.experts.down_bias, "down"),
    )
    expert_map = case.experts.expert_map
    z, out = torch.empty(case.ids.numel(), down.columns), torch.empty_like(case.x)
    gate_up_gemv(case.x, case.ids, expert_map, up, z, 7.0, 1.702, blocks, splits[0]).run()
    down_gemv(z, case.ids, case.weights, expert_map, down, out, blocks, splits[1]).run()
    return out


def by_grouped_gemm(
    case: Layer, blocks: Blocks, splits: tuple[int, int], block_n: int, operands=None
) -> torch.Tensor:
    up, down = operands or (
        operand(case.experts.gate_up, case.experts.gate_up_bias, "gate_up"),
        operand(case.experts.down, case.experts.down_bias, "down"),
    )
    expert_map, top_k = case.experts.expert_map, case.ids.shape[1]
    experts = up.data.shape[0] if expert_map is None else len(expert_map)
    routing = empty_routing(case.ids.numel(), experts, block_n, case.x.device)
    z = torch.empty(case.ids.numel(), down.columns)
    parts, out = torch.empty(case.ids.numel(), case.x.shape[1]), torch.empty_like(case.x)
    for launch in (
        *routing_launches(case.ids, experts, routing),
        gate_up_grouped_gemm(case.x, top_k, routing, expert_map, up, z, 7.0, 1.702, blocks, splits[0], True),
        down_grouped_gemm(z, case.weights, routing, expert_map, down, parts, blocks, splits[1], True),
        combine(parts, out, top_k),
    ):
        launch.run()
    return out


@pytest.mark.parametrize("columns", [32, 64, 128])
@pytest.mark.parametrize("form", ["mxfp4", "dense"])
def test_any_step_of_the_reduction(form: str, columns: int) -> None:
    """160 and 96 values in steps of 32 (even), 64 and 128 (masked ends); 32 of 64 rows in the last piece."""
    case = layer(Case(3, 2, 2, form, True), hidden=160, intermediate=96)
    expected = case.expected()
    assert error(by_gemv(case, Blocks(64, columns, 4, 1), (1, 1)), expected) < 2e-6
    assert error(by_grouped_gemm(case, Blocks(64, columns, 4, 1), (1, 1), 8), expected) < 2e-6


@pytest.mark.parametrize(
    ("form", "split_k"),
    [
        ("mxfp4", SPLIT_K_CHOICES[-1]),
        ("dense", SPLIT_K_CHOICES[1]),
        *(
            pytest.param(f, s, marks=pytest.mark.slow)
            for f in ("mxfp4", "dense")
            for s in SPLIT_K_CHOICES[1:]
        ),
    ],
)
def test_split_reductions(form: str, split_k: int) -> None:
    """Also into more parts than there are steps. Twice, bit for bit: counters are left at zero."""
    case = layer(Case(2, 2, 1, form, False), intermediate=64)
    expected = case.expected()
    runs = [by_gemv(case, Blocks(64, 64, 4, 1), (split_k, split_k)) for _ in range(2)]
    assert error(runs[0], expected) < 2e-6
    assert torch.equal(*runs)
    runs = [by_grouped_gemm(case, Blocks(128, 64, 4, 1), (split_k, split_k), 8) for _ in range(2)]
    assert error(runs[0], expected) < 2e-6
    assert torch.equal(*runs)


@pytest.mark.parametrize("way", ["gemv", "grouped_gemm"])
def test_every_scale_and_code_decodes_exactly(way: str) -> None:
    """Weights times unit vectors: each output is one weight, so every bit of the decoding shows.

    down has the 256 scales as rows and the 16 codes (twice) as columns; z of a unit vector comes from
    gate_up, which is left out: the kernels are run on z directly.
    """
    codes = np.arange(32, dtype=np.uint8) % 16
    block = torch.from_numpy(codes[0::2] | (codes[1::2] << 4))
    blocks = block.expand(1, 256, 1, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).reshape(1, 256, 1)
    down = operand(Mxfp4Weight(blocks, scales), torch.zeros(1, 256), "down")
    assert down.any_e8m0
    z = torch.eye(32)
    ids, weights = torch.zeros(32, 1, dtype=torch.int64), torch.ones(32, 1)
    out = torch.empty(32, 256)
    if way == "gemv":
        down_gemv(z, ids, weights, None, down, out, Blocks(128, 32, 4, 1), 1).run()
    else:
        routing = empty_routing(32, 1, 32, z.device)
        for launch in routing_launches(ids, 1, routing):
            launch.run()
        down_grouped_gemm(z, weights, routing, None, down, out, Blocks(64, 32, 4, 1), 1, True).run()
    size = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes & 7]
    with np.errstate(over="ignore", invalid="ignore"):
        exact = np.ldexp(np.where(codes & 8, -size, size)[:, None], np.arange(256) - 127).astype(np.float32)
        # A sum with an infinity times zero in it is NaN, in every product of the row.
        rows = np.where(np.isinf(exact).any(axis=0), np.nan, exact)
        rows = np.where(np.isinf(exact), np.where(np.isinf(exact).sum(axis=0) > 1, np.nan, exact), rows)
    np.testing.assert_array_equal(out.numpy(), rows)


@pytest.mark.parametrize(("scales", "any_e8m0"), [((0, 3), False), ((127, 129), False), ((127, 130), True)])
def test_scales_at_the_edge_of_the_plain_path(scales: tuple[int, int], any_e8m0: bool) -> None:
    """128 is the last scale decoded in one multiplication; 129 is the first of the path for any scale."""
    case = layer(Case(2, 1, 2, "mxfp4", False), scales=scales)
    weight = operand(case.experts.gate_up, case.experts.gate_up_bias, "gate_up")
    assert weight.any_e8m0 == any_e8m0
    check(case)


def test_the_path_for_any_scale_gives_the_bits_of_the_plain_one() -> None:
    case = layer(Case(2, 1, 2, "mxfp4", False))
    plain = (
        operand(case.experts.gate_up, case.experts.gate_up_bias, "gate_up"),
        operand(case.experts.down, case.experts.down_bias, "down"),
    )
    two_steps = tuple(replace(weight, any_e8m0=True) for weight in plain)
    blocks = Blocks(32, 64, 4, 1)
    assert torch.equal(by_gemv(case, blocks, (1, 1), plain), by_gemv(case, blocks, (1, 1), two_steps))
    assert torch.equal(
        by_grouped_gemm(case, blocks, (1, 1), 8, plain), by_grouped_gemm(case, blocks, (1, 1), 8, two_steps)
    )


def test_results_repeat_and_do_not_depend_on_the_other_tokens() -> None:
    """Sorted tiles hold a token's row alone: its bits are those of any batch of that way."""
    case = layer(Case(3, 2, 17, "mxfp4", False))
    blocks = Blocks(64, 64, 4, 1)
    whole = by_grouped_gemm(case, blocks, (1, 1), 16)
    assert torch.equal(whole, by_grouped_gemm(case, blocks, (1, 1), 16))
    some = replace(case, x=case.x[3:9].contiguous(), ids=case.ids[3:9], weights=case.weights[3:9])
    some = replace(some, ids=some.ids.contiguous(), weights=some.weights.contiguous())
    np.testing.assert_allclose(by_grouped_gemm(some, blocks, (1, 1), 16), whole[3:9], rtol=1e-5, atol=1e-5)


def test_nan_in_one_token_stays_in_it() -> None:
    case = layer(Case(3, 2, 9, "mxfp4", False))
    x = case.x.clone()
    x[4] = float("nan")
    out = TritonBackend().experts(x, case.ids, case.weights, case.experts)
    assert out[4].isnan().all()
    clean = torch.arange(9) != 4
    expected = case.expected()[clean.numpy()]
    assert error(out[clean], expected) < 2e-6


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: replace(w, down_bias=w.down_bias[:, 1:]), "down: bias"),
        (lambda w: replace(w, down=Mxfp4Weight(w.down.blocks.int(), w.down.scales)), "down is torch.int32"),
        (lambda w: replace(w, down=Mxfp4Weight(w.down.blocks, w.down.scales[:, 1:])), "scales"),
        (lambda w: replace(w, down=w.gate_up, down_bias=w.gate_up_bias), "x has 96 columns"),
        (lambda w: replace(w, expert_map=torch.tensor([0.0])), "expert_map is torch.float32"),
    ],
)
def test_refusals(change, says: str) -> None:
    case = layer(Case(3, 2, 1, "mxfp4", False))
    with pytest.raises(UsageError, match=says):
        TritonBackend().experts(case.x, case.ids, case.weights, change(case.experts))


def test_units_of_the_layers_are_what_the_cases_say() -> None:
    case = layer(Case(3, 2, 1, "dense", False))
    assert (case.experts.down.columns, case.experts.down.rows) == (INTERMEDIATE, HIDDEN)
