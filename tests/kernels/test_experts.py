"""Both ways through the experts compute the weighted sum that the formula says."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from moe_surgery.kernels.reference.experts import swiglu  # noqa: E402
from moe_surgery.kernels.weights import DenseWeight, Mxfp4Weight, Weight  # noqa: E402
from tests.kernels.brute_force import WAYS, Case, brute_force_experts, make_case  # noqa: E402

# Largest error in units of the largest output.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def check(case: Case, way: str, dtype: torch.dtype) -> None:
    got, expected = case.run(way, dtype), brute_force_experts(case)
    assert got.dtype == dtype
    error = np.abs(got.double().numpy() - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE[dtype]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    experts = draw(st.integers(1, 6))
    return make_case(
        draw(st.integers(0, 2**32 - 1)),
        tokens=draw(st.integers(1, 5)),
        experts=experts,
        top_k=draw(st.integers(1, experts)),
        hidden=32 * draw(st.integers(1, 5)),
        intermediate=32 * draw(st.integers(1, 5)),
        stored=draw(st.none() | st.integers(experts, 8)),
        packed=draw(st.booleans()),
    )


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("way", WAYS)
@given(case=cases())
def test_the_sum_of_the_chosen_experts_is_the_formulas(way: str, dtype: torch.dtype, case: Case) -> None:
    check(case, way, dtype)


@given(case=cases())
def test_grouped_and_gathered_agree(case: Case) -> None:
    one, other = (case.run(way, torch.float32) for way in WAYS)
    assert (one - other).abs().max() <= 1e-5 * one.abs().max()


@pytest.mark.parametrize("piece_bytes", [1, 3 * 64 * 4, 5 * 64 * 4])
@pytest.mark.parametrize("way", WAYS)
def test_weights_decoded_in_pieces_of_any_size_give_the_same(
    way: str, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("moe_surgery.kernels.reference.experts"), "PIECE_BYTES", piece_bytes)
    check(make_case(), way, torch.float32)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_an_index_gives_the_bits_of_tensors_cut_by_it(way: str, packed: bool, dtype: torch.dtype) -> None:
    case = make_case(experts=3, stored=7, packed=packed)
    expert_map = case.experts.expert_map

    def cut(weight: Weight) -> Weight:
        if isinstance(weight, DenseWeight):
            return DenseWeight(weight.values[expert_map])
        return Mxfp4Weight(weight.blocks[expert_map], weight.scales[expert_map])

    e = case.experts
    own = replace(
        e,
        gate_up=cut(e.gate_up),
        gate_up_bias=e.gate_up_bias[expert_map],
        down=cut(e.down),
        down_bias=e.down_bias[expert_map],
        expert_map=None,
    )
    assert torch.equal(case.run(way, dtype), replace(case, experts=own).run(way, dtype))


@pytest.mark.parametrize("way", WAYS)
def test_an_expert_nobody_chose_leaves_no_trace(way: str) -> None:
    case = make_case(experts=4, packed=False)
    case.ids = np.array([[0, 2]] * len(case.x))
    before = case.run(way, torch.float32)
    for weight in (case.experts.gate_up, case.experts.down):
        assert isinstance(weight, DenseWeight)
        weight.values[[1, 3]] = float("nan")
    assert torch.equal(case.run(way, torch.float32), before)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_swiglu_clamps_the_gate_above_and_the_up_row_on_both_sides(dtype: torch.dtype) -> None:
    gate = torch.tensor([-50.0, -7.0, 0.0, 7.0, 50.0, 50.0])
    up = torch.tensor([50.0, -50.0, 3.0, -7.0, 7.0, -50.0])
    h = torch.stack((gate, up), dim=-1).flatten().to(dtype)
    sigmoid = 1 / (1 + np.exp(-1.702 * np.array([-50.0, -7, 0, 7, 7, 7])))
    expected = np.array([8.0, -6, 4, -6, 8, -6]) * np.array([-50.0, -7, 0, 7, 7, 7]) * sigmoid
    got = swiglu(h, 7.0, 1.702)
    assert got.dtype == dtype
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
