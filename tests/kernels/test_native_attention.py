"""Native attention and rotary embedding against float64 and the reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from moe_surgery.errors import UsageError  # noqa: E402
from moe_surgery.kernels.native import NativeBackend  # noqa: E402
from moe_surgery.kernels.reference import ReferenceBackend  # noqa: E402
from tests.kernels.native_cases import (  # noqa: E402
    draw,
    every_variant,
    native,
    needs_native,
)

pytestmark = needs_native

REFERENCE = ReferenceBackend()
# Sixteen bits of a block's largest value; sums in float32.
EXPERTS_ERROR = 1e-4
SUM_ERROR = 1e-6
THREADS = (1, 2, 3, 5)
LONG_STEP = 64
STORED = (torch.bfloat16, torch.float16, torch.float32)
# Of float32 keys: sums of two BF16 values, where attention is computed in tiles.
TILES_ERROR = 1e-4


def tolerance(isa: str | None, step: int) -> float:
    """The largest error in float32."""
    tiles = (isa or NativeBackend.instruction_sets()[0]) == "amx" and step >= LONG_STEP
    return TILES_ERROR if tiles else 2e-6


def attention_case(
    seed: int, batch: int, kv_heads: int, group: int, head_dim: int, slots: int, queries: int, filled: int
) -> dict[str, torch.Tensor]:
    """A cache of `filled` positions at slots of any order, and the last `queries` of them."""
    rng = np.random.default_rng(seed)
    positions = np.full((batch, slots), -1, np.int64)
    for row in positions:
        row[rng.permutation(slots)[:filled]] = np.arange(filled)
    at = np.arange(filled - queries, filled)[None].repeat(batch, 0)
    return {
        "q": draw(seed, batch, kv_heads * group, queries, head_dim),
        "k": draw(seed + 1, batch, kv_heads, slots, head_dim),
        "v": draw(seed + 2, batch, kv_heads, slots, head_dim),
        "sinks": draw(seed + 3, kv_heads * group).bfloat16(),
        "queries": torch.from_numpy(at),
        "keys": torch.from_numpy(positions),
    }


@st.composite
def attentions(draw_: st.DrawFn) -> dict[str, torch.Tensor]:
    slots = draw_(st.integers(1, 70) | st.integers(1, 200))
    filled = draw_(st.integers(1, slots))
    return attention_case(
        draw_(st.integers(0, 2**32 - 1)),
        draw_(st.integers(1, 3)),
        draw_(st.integers(1, 3)),
        draw_(st.integers(1, 4)),
        draw_(st.sampled_from([2, 6, 16, 64, 80])),
        slots,
        draw_(st.integers(1, filled)),
        filled,
    )


@every_variant
@settings(max_examples=30)
@given(
    case=attentions(),
    window=st.none() | st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    step=st.sampled_from([1, LONG_STEP]),
)
def test_attention_is_the_references_and_every_query_gets_what_it_gets_alone(
    isa: str, case: dict[str, torch.Tensor], window: int | None, dtype: torch.dtype, step: int
) -> None:
    case = {n: t if n in ("queries", "keys", "sinks") else t.to(dtype) for n, t in case.items()}
    backend = native(isa, 3).for_tokens(step)
    got = backend.attention(**case, window=window)
    assert got.dtype == dtype
    in_float32 = {n: t if n in ("queries", "keys") else t.double().float() for n, t in case.items()}
    expected = REFERENCE.attention(**in_float32, window=window)
    error = tolerance(isa, step)
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=error if dtype == torch.float32 else 2e-2)
    if error < TILES_ERROR:
        assert torch.equal(got, native("scalar").for_tokens(step).attention(**case, window=window))
    order = torch.randperm(case["k"].shape[2], generator=torch.Generator().manual_seed(0))
    for i in range(case["q"].shape[2]):
        one = {
            **case,
            "q": case["q"][:, :, i : i + 1],
            "queries": case["queries"][:, i : i + 1],
            "k": case["k"][:, :, order],
            "v": case["v"][:, :, order],
            "keys": case["keys"][:, order],
        }
        assert torch.equal(native(isa).for_tokens(step).attention(**one, window=window)[:, 0], got[:, i])


@pytest.mark.parametrize("step", [1, LONG_STEP])
def test_a_query_that_sees_nothing_gives_zeros(step: int) -> None:
    case = attention_case(0, 1, 2, 2, 16, 8, 2, 5)
    case["queries"][0, 0] = -1
    got = native().for_tokens(step).attention(**case, window=None)
    assert not got[0, 0].any()
    assert got[0, 1].all()


@pytest.mark.parametrize("step", [1, LONG_STEP])
@pytest.mark.parametrize("group", [1, 3, 8, 70])
def test_heads_that_share_keys_in_any_number(group: int, step: int) -> None:
    case = attention_case(group, 2, 2, group, 64, 300, 6, 290)
    expected = REFERENCE.attention(**case, window=None)
    got = native(threads=2).for_tokens(step).attention(**case, window=None)
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance(None, step))


@pytest.mark.parametrize("step", [1, LONG_STEP])
def test_a_key_that_a_query_does_not_see_cannot_spoil_it(step: int) -> None:
    case = attention_case(1, 1, 1, 4, 64, 100, 100, 100)
    clean = native().for_tokens(step).attention(**case, window=None)
    latest = int(case["keys"][0].argmax())
    case["k"][:, :, latest] = float("nan")
    case["v"][:, :, latest] = float("inf")
    got = native().for_tokens(step).attention(**case, window=None)
    assert torch.equal(got[:, :-1], clean[:, :-1])
    assert got[:, -1].isnan().any()


@settings(max_examples=30)
@given(
    positions=st.lists(st.integers(0, 131071), min_size=1, max_size=40),
    width=st.integers(1, 40),
    scale=st.floats(0.5, 2),
)
def test_turns_are_cosine_and_sine_however_many_are_asked_for(
    positions: list[int], width: int, scale: float
) -> None:
    frequencies = 1.0 / 150000 ** (torch.arange(width) / width)
    at = torch.tensor(positions)
    cos, sin = native().rope_cos_sin(at[None], frequencies, scale)
    angles = (at[:, None].float() * frequencies).double()
    torch.testing.assert_close(cos[0], (angles.cos() * scale).float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sin[0], (angles.sin() * scale).float(), rtol=1e-6, atol=1e-7)
    assert torch.equal(native().rope_cos_sin(at[-1:], frequencies, scale)[0], cos[0, -1:])


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 5), max_size=3),
    half=st.integers(1, 40),
    alone=st.lists(st.booleans(), min_size=3, max_size=3),
    transposed=st.booleans(),
)
def test_heads_are_rotated_by_their_angles(
    sizes: list[int], half: int, alone: list[bool], transposed: bool
) -> None:
    x = draw(0, *sizes, 2 * half)
    if transposed and len(sizes) > 1:  # as a model's heads, which are a view
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    shape = [1 if one else n for n, one in zip(sizes, alone, strict=False)]
    angles = draw(1, *shape, half).double()
    cos, sin = angles.cos().float(), angles.sin().float()
    turn = torch.complex(cos.double(), sin.double())
    expected = torch.view_as_real(torch.complex(*x.double().chunk(2, -1)) * turn)
    result = native().apply_rope(x, cos, sin)
    torch.testing.assert_close(result.double(), torch.cat(expected.unbind(-1), -1), rtol=0, atol=1e-5)
    assert torch.equal(
        native().apply_rope(x.bfloat16(), cos, sin), REFERENCE.apply_rope(x.bfloat16(), cos, sin)
    )
    assert torch.equal(result, REFERENCE.apply_rope(x, cos, sin))


def test_angles_that_fit_no_head_are_refused() -> None:
    x, angles = draw(0, 2, 3, 8), draw(1, 2, 1, 4)
    for wrong in (draw(1, 2, 1, 3), draw(1, 2, 2, 4), draw(1, 3, 4)):
        with pytest.raises(UsageError, match="cannot be rotated by angles"):
            native().apply_rope(x, wrong, wrong)
        with pytest.raises(UsageError, match="cannot be rotated by angles"):
            native().apply_rope(x, angles, wrong)


# --- threads
