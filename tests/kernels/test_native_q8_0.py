"""Matrices in Q8_0: their values are the gguf package's, and products with them those of float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf", reason="the gguf package quantises as well")

from moe_surgery.errors import InvalidInputError, UsageError  # noqa: E402
from moe_surgery.kernels.differentiable import DifferentiableBackend  # noqa: E402
from moe_surgery.kernels.interface import SHORT_STEP  # noqa: E402
from moe_surgery.kernels.q8_0 import Q8Matrix, as_stored, quantise  # noqa: E402
from moe_surgery.kernels.reference import ReferenceBackend  # noqa: E402
from moe_surgery.kernels.reference.dense import linear  # noqa: E402
from tests.kernels.native_cases import TILED, draw, every_variant, native, needs_native  # noqa: E402

STORED = (torch.bfloat16, torch.float16, torch.float32)
# Blocks of a row: fewer than 16, 16, and more with a rest and without.
BLOCKS = (1, 2, 3, 9, 10, 15, 16, 17, 32, 35)
ROUNDING = 0.51 / 32639
"""Of a block's largest activation: 16 bits, and the rounding of the factor."""
SUM_ERROR = 1e-6
SPLIT_ERROR = 2 * 2**-17
"""Activations and weights as sums of two BF16 values."""


def gguf_values(matrix: torch.Tensor) -> torch.Tensor:
    """What a GGUF file with the matrix in Q8_0 says, float32."""
    kind = gguf.GGMLQuantizationType.Q8_0
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(matrix.float().numpy(), kind), kind))


@st.composite
def matrices(draw_: st.DrawFn) -> torch.Tensor:
    rows, blocks = draw_(st.integers(1, 40)), draw_(st.sampled_from(BLOCKS))
    seed, scale = draw_(st.integers(0, 2**32 - 1)), draw_(st.sampled_from([1e-3, 1.0, 300.0]))
    matrix = draw(seed, rows, 32 * blocks) * scale
    matrix[draw(seed + 1, rows, 32 * blocks) > 1.5] = 0
    if draw_(st.booleans()):
        matrix[:, :32] = 0  # a scale of 0
    return matrix.to(draw_(st.sampled_from(STORED)))


@given(matrix=matrices())
def test_values_are_those_of_the_gguf_package(matrix: torch.Tensor) -> None:
    quantised = quantise(matrix, "here")
    expected = gguf_values(matrix)
    assert quantised.shape == matrix.shape
    assert len(quantised) == len(matrix)
    assert torch.equal(quantised.dequantise(), expected)
    assert torch.equal(quantised.dequantise(1, 3), expected[1:3])
    size = -(-matrix.shape[1] // 32 * 34 // 64) * 64
    assert quantised.nbytes == len(matrix) * size
    assert quantised.data_ptr() % 64 == 0


def test_a_window_of_a_larger_matrix(tmp_path: object) -> None:
    matrix = draw(0, 40, 200).bfloat16()
    window = matrix[3:30, 5:165]
    assert torch.equal(quantise(window, "here").dequantise(), gguf_values(window))


def test_a_matrix_of_several_pieces() -> None:
    matrix = draw(0, 9000, 512).bfloat16()
    assert torch.equal(quantise(matrix, "here").dequantise(), gguf_values(matrix))


def test_what_q8_0_cannot_hold_is_named() -> None:
    with pytest.raises(
        UsageError, match=r"^a\.bin: tensor 'w': has 40 columns; `dense` q8_0 needs a multiple of 32$"
    ):
        quantise(draw(0, 3, 40), "a.bin: tensor 'w'")
    bad = draw(0, 20000, 320)
    bad[19000, 100] = float("nan")
    with pytest.raises(
        InvalidInputError,
        match=r"^a\.bin: tensor 'w', row 19000: values from 96: a NaN or an infinity; Q8_0 cannot hold it$",
    ):
        quantise(bad, "a.bin: tensor 'w'")
    with pytest.raises(UsageError, match="the triton backend does not read Q8_0"):
        as_stored(quantise(draw(0, 2, 32), "w"), "triton")


# --- products


@st.composite
def products(draw_: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    matrix, seed = draw_(matrices()), draw_(st.integers(0, 2**32 - 1))
    tokens = draw_(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16, 33]))
    x = draw(seed, tokens, matrix.shape[1])
    bias = draw(seed + 1, len(matrix)).to(draw_(st.sampled_from(STORED))) if draw_(st.booleans()) else None
    return x, matrix, bias


def exact(
    x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The product in float64, the sum of its terms' sizes, and the error that rounding activations may make."""
    weight, inputs = gguf_values(matrix).double().numpy(), x.double().numpy()
    product, size = inputs @ weight.T, np.abs(inputs) @ np.abs(weight).T
    largest = np.abs(inputs).reshape(len(x), -1, 32).max(axis=2)
    rounding = ROUNDING * largest @ np.abs(weight).reshape(len(weight), -1, 32).sum(axis=2).T
    if bias is not None:
        product, size = product + bias.double().numpy(), size + np.abs(bias.double().numpy())
    return product, size, rounding


@needs_native
@every_variant
@settings(max_examples=60)
@given(case=products(), threads=st.sampled_from([1, 2, 3]))
def test_native_products(
    isa: str, case: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], threads: int
) -> None:
    x, matrix, bias = case
    weight = quantise(matrix, "here")
    got = native(isa, threads).linear(x, weight, bias)
    product, size, rounding = exact(x, matrix, bias)
    assert (np.abs(got.double().numpy() - product) <= SUM_ERROR * size + rounding + 1e-30).all()
    assert torch.equal(got, native("scalar").linear(x, weight, bias))
    for i in range(len(x)):
        assert torch.equal(native(isa).linear(x[i], weight, bias), got[i])


@needs_native
@pytest.mark.parametrize("isa", TILED)
@settings(max_examples=40)
@given(case=products(), threads=st.sampled_from([1, 2, 3]))
def test_native_products_of_long_steps(
    isa: str, case: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], threads: int
) -> None:
    x, matrix, bias = case
    weight, tiled = quantise(matrix, "here"), native(isa, threads).for_tokens(SHORT_STEP + 1)
    got = tiled.linear(x, weight, bias)
    product, size, _ = exact(x, matrix, bias)
    assert (np.abs(got.double().numpy() - product) <= (SPLIT_ERROR + SUM_ERROR) * size + 1e-30).all()
    for i in range(len(x)):
        assert torch.equal(tiled.linear(x[i], weight, bias), got[i])


@needs_native
@every_variant
def test_the_largest_codes_and_activations_do_not_overflow(isa: str) -> None:
    signs = torch.where(draw(0, 6, 1056) > 0, 1.0, -1.0)
    signs[0], signs[1] = 1, -1
    weight, x = quantise(signs * 127, "here"), torch.cat((signs[:2], signs)) * 32639
    got = native(isa).linear(x, weight)
    error = got.double() - x.double() @ (signs.double() * 127).T
    assert error.abs().max() <= SUM_ERROR * 1056 * 32639 * 127


@needs_native
@every_variant
def test_a_token_that_is_not_finite_stays_so_and_alone(isa: str) -> None:
    x, weight = draw(0, 5, 160), quantise(draw(1, 9, 160), "here")
    expected = native(isa).linear(x, weight)
    x[1, 7], x[3, 100] = float("nan"), float("inf")
    got = native(isa).linear(x, weight)
    assert got[[1, 3]].isnan().all()
    assert torch.equal(got[[0, 2, 4]], expected[[0, 2, 4]])


@needs_native
def test_products_of_both_kinds_in_one_call() -> None:
    x = draw(0, 2, 3, 96)
    pairs = [
        (quantise(draw(1, 40, 96), "q"), None),
        (draw(2, 7, 96), draw(3, 7)),
        (quantise(draw(4, 3, 96), "v"), draw(5, 3)),
    ]
    for y, (weight, bias) in zip(native("", 2).multi_linear(x, pairs), pairs, strict=True):
        assert y.shape == (2, 3, len(weight))
        assert torch.equal(y, native().linear(x, weight, bias))


@needs_native
def test_bfloat16_activations_give_the_rounded_product() -> None:
    x, weight = draw(0, 4, 320).bfloat16(), quantise(draw(1, 30, 320).bfloat16(), "here")
    assert torch.equal(native().linear(x, weight), native().linear(x.float(), weight).bfloat16())


@settings(max_examples=40)
@given(case=products())
def test_reference_products(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]) -> None:
    x, matrix, bias = case
    got = ReferenceBackend().linear(x, quantise(matrix, "here"), bias)
    product, size, _ = exact(x, matrix, bias)
    assert (np.abs(got.double().numpy() - product) <= 1e-5 * size + 1e-30).all()


@pytest.mark.parametrize("dtype", STORED)
def test_the_reference_multiplies_values_in_the_compute_dtype(dtype: torch.dtype) -> None:
    x, matrix, bias = draw(0, 3, 160).to(dtype), draw(1, 50, 160), draw(2, 50)
    values = gguf_values(matrix).to(dtype)
    assert torch.equal(
        linear(x, quantise(matrix, "here"), bias), torch.nn.functional.linear(x, values) + bias.to(dtype)
    )


def test_large_matrices_are_dequantised_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = draw(0, 3, 160), quantise(draw(1, 50, 160), "here")
    whole = linear(x, weight)
    monkeypatch.setattr("moe_surgery.kernels.reference.dense.PIECE_BYTES", 7 * 160 * 4)
    seen: list[int] = []
    rows = Q8Matrix.dequantise
    monkeypatch.setattr(
        Q8Matrix,
        "dequantise",
        lambda self, a, b: seen.append(b - a) or rows(self, a, b),  # type: ignore[func-returns-value]
    )
    torch.testing.assert_close(linear(x, weight), whole, rtol=1e-5, atol=1e-5)
    assert seen == [7] * 8


def test_gradients_to_the_input() -> None:
    x, weight = draw(0, 3, 160).requires_grad_(), quantise(draw(1, 50, 160), "here")
    upstream = draw(2, 3, 50)
    (DifferentiableBackend().linear(x, weight) * upstream).sum().backward()
    torch.testing.assert_close(x.grad, upstream @ weight.dequantise(), rtol=1e-5, atol=1e-5)
