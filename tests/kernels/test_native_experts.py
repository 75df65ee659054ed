"""The native experts against float64 and the reference: every instruction set, shape and address."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from moe_surgery.kernels.reference import ReferenceBackend  # noqa: E402
from moe_surgery.kernels.weights import DenseWeight, ExpertWeights, Mxfp4Weight, Weight  # noqa: E402
from tests.kernels.brute_force import Case, brute_force_experts, make_case  # noqa: E402
from tests.kernels.native_cases import (  # noqa: E402
    VARIANTS,
    every_variant,
    native,
    needs_native,
    relative_error,
    run,
    shifted,
)

pytestmark = needs_native

REFERENCE = ReferenceBackend()
# Sixteen bits of a block's largest value; sums in float32.
EXPERTS_ERROR = 1e-4
SUM_ERROR = 1e-6
THREADS = (1, 2, 3, 5)
STORED = (torch.bfloat16, torch.float16, torch.float32)


def stored_as(experts: ExpertWeights, dtype: torch.dtype, bias: torch.dtype) -> ExpertWeights:
    """Dense experts whose values and biases are stored in other dtypes."""

    def of(weight: Weight) -> Weight:
        return DenseWeight(weight.values.to(dtype)) if isinstance(weight, DenseWeight) else weight

    biases = {"gate_up_bias": experts.gate_up_bias.to(bias), "down_bias": experts.down_bias.to(bias)}
    return replace(experts, gate_up=of(experts.gate_up), down=of(experts.down), **biases)


@st.composite
def cases(draw: st.DrawFn, packed: bool | None = None) -> Case:
    experts = draw(st.sampled_from([1, 2, 3, 5, 32, 64]))
    stored = draw(st.none() | st.integers(experts, experts + 4))
    case = make_case(
        draw(st.integers(0, 2**32 - 1)),
        tokens=draw(st.sampled_from([1, 2, 3, 4, 5, 8, 17, 64])),
        experts=experts,
        top_k=draw(st.integers(1, min(experts, 8))),
        hidden=32 * draw(st.integers(1, 9)),
        intermediate=32 * draw(st.integers(1, 9)),
        stored=stored,
        packed=draw(st.booleans()) if packed is None else packed,
    )
    dtypes = draw(st.sampled_from(STORED)), draw(st.sampled_from(STORED))
    return replace(case, experts=stored_as(case.experts, *dtypes))


@every_variant
@settings(max_examples=12)
@given(case=cases(), threads=st.sampled_from(THREADS), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_experts_are_the_formulas(isa: str, case: Case, threads: int, dtype: torch.dtype) -> None:
    held = {
        torch.float32: lambda a: a,
        torch.bfloat16: lambda a: torch.from_numpy(a).to(dtype).double().numpy(),
    }
    inputs = Case(held[dtype](case.x), case.ids, held[dtype](case.weights), case.experts)
    got = run(native(isa, threads), case, dtype)
    assert got.dtype == dtype
    assert relative_error(got, brute_force_experts(inputs)) <= (
        EXPERTS_ERROR if dtype == torch.float32 else 4e-3
    )


@settings(max_examples=15)
@given(case=cases(), threads=st.sampled_from(THREADS))
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(case: Case, threads: int) -> None:
    expected = run(native("scalar"), case, torch.float32)
    for isa in VARIANTS:
        assert torch.equal(run(native(isa, threads), case, torch.float32), expected), isa


@every_variant
@settings(max_examples=8)
@given(case=cases(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_token_gets_from_experts_what_it_gets_alone(isa: str, case: Case, dtype: torch.dtype) -> None:
    backend = native(isa, 3)
    together = run(backend, case, dtype)
    for i in range(len(case.x)):
        alone = Case(case.x[i : i + 1], case.ids[i : i + 1], case.weights[i : i + 1], case.experts)
        assert torch.equal(run(backend, alone, dtype)[0], together[i])


@every_variant
def test_one_layer_errs_less_than_bf16_arithmetic(isa: str) -> None:
    case = make_case(7, tokens=8, experts=8, top_k=4, hidden=960, intermediate=960)
    exact = brute_force_experts(case)
    ours = relative_error(run(native(isa), case, torch.float32), exact)
    bf16 = relative_error(run(REFERENCE, case, torch.bfloat16).float(), exact)
    assert ours < 1e-4 < 1e-3 < bf16


@every_variant
@settings(max_examples=6)
@given(case=cases(packed=False))
def test_dense_experts_have_the_same_bits_in_every_dtype_that_holds_them(isa: str, case: Case) -> None:
    """Their values have few bits, so that F16 holds what BF16 does."""
    in_float32 = stored_as(case.experts, torch.float32, torch.float32)
    expected = run(native(isa, 2), replace(case, experts=in_float32), torch.float32)
    for dtype in STORED:
        experts = stored_as(in_float32, dtype, torch.float32)
        assert torch.equal(run(native(isa, 2), replace(case, experts=experts), torch.float32), expected)


def moved(weight: Weight, by: int) -> Weight:
    if isinstance(weight, DenseWeight):
        return DenseWeight(shifted(weight.values, weight.values.itemsize * by))
    return Mxfp4Weight(shifted(weight.blocks, by), shifted(weight.scales, by + 3))


@every_variant
@pytest.mark.parametrize("stored", [torch.uint8, *STORED])
@given(by=st.integers(0, 63))
@settings(max_examples=6)
def test_weights_may_lie_at_any_address(isa: str, stored: torch.dtype, by: int) -> None:
    case = make_case(1, hidden=160, intermediate=96, packed=stored == torch.uint8)
    e = stored_as(case.experts, stored, torch.float32)
    case = replace(case, experts=e)
    elsewhere = replace(e, gate_up=moved(e.gate_up, by), down=moved(e.down, by + 1))
    expected = run(native(isa), case, torch.float32)
    assert torch.equal(run(native(isa), replace(case, experts=elsewhere), torch.float32), expected)


@every_variant
@pytest.mark.parametrize("packed", [True, False])
def test_an_index_gives_the_bits_of_tensors_cut_by_it(isa: str, packed: bool) -> None:
    case = make_case(experts=3, stored=7, packed=packed, tokens=6)
    e, expert_map = case.experts, case.experts.expert_map

    def cut(weight: Weight) -> Weight:
        if isinstance(weight, DenseWeight):
            return DenseWeight(weight.values[expert_map])
        return Mxfp4Weight(weight.blocks[expert_map], weight.scales[expert_map])

    own = ExpertWeights(cut(e.gate_up), e.gate_up_bias[expert_map], cut(e.down), e.down_bias[expert_map])
    expected = run(native(isa), replace(case, experts=own), torch.float32)
    assert torch.equal(run(native(isa), case, torch.float32), expected)


@every_variant
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_none_and_stays_with_its_token(isa: str, value: float) -> None:
    case = make_case(2, tokens=3)
    expected = run(native(isa), case, torch.float32)
    case.x[1, 5] = value
    got = run(native(isa), case, torch.float32)
    assert not got[1].isfinite().any()
    assert torch.equal(got[[0, 2]], expected[[0, 2]])


@every_variant
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-20, 1e20])
def test_activations_of_any_size_keep_their_precision(isa: str, size: float) -> None:
    case = make_case(3, tokens=2)
    case.x *= size
    assert relative_error(run(native(isa), case, torch.float32), brute_force_experts(case)) <= EXPERTS_ERROR


# --- dense products
