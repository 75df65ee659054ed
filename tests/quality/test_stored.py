"""Quantised weights as dense ones, against numpy in float64 and a Linear at a time."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moe_surgery.checkpoint.checkpoint import TensorRef  # noqa: E402
from moe_surgery.errors import InvalidInputError  # noqa: E402
from moe_surgery.quality.transformers_layers.stored import dense_tensors  # noqa: E402

DTYPES = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int64: "I64",
}
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
RNG = np.random.default_rng(5)


def decoded(tensors: dict[str, torch.Tensor], **config: object) -> dict[str, np.ndarray]:
    refs = {
        name: TensorRef(name, "x", DTYPES[t.dtype], tuple(t.shape), 0, t.nbytes)
        for name, t in tensors.items()
    }
    found = {}
    for dense in dense_tensors(refs, config, "here"):
        value = dense.decode({part: tensors[n] for part, n in dense.parts.items()}, torch.float32)
        found[dense.name] = value.double().numpy()
    return found


@pytest.mark.parametrize(
    ("scale", "name"),
    [((), "weight_scale"), ((1,), "weight_scale"), ((40, 1), "weight_scale"), ((3, 2), "weight_scale_inv")],
)
def test_fp8_has_one_scale_one_a_row_or_one_a_block(scale: tuple[int, ...], name: str) -> None:
    codes = torch.tensor(RNG.normal(size=(40, 24)) * 50).to(torch.float8_e4m3fn)
    factors = RNG.uniform(0.5, 2, scale).astype(np.float32)
    tensors = {"a.weight": codes, f"a.{name}": torch.tensor(factors), "a.input_scale": torch.tensor([3.0])}
    found = decoded(tensors, quantization_config={"weight_block_size": [16, 16]})
    expected = np.empty((40, 24))
    for row in range(40):
        for column in range(24):
            if scale == (3, 2):
                factor = factors[row // 16, column // 16]
            else:
                factor = factors[row, 0] if scale == (40, 1) else factors.reshape(-1)[0]
            expected[row, column] = float(codes[row, column]) * factor
    assert list(found) == ["a.weight"]
    np.testing.assert_allclose(found["a.weight"], expected, rtol=1e-6)


def test_fp8_of_stacked_experts_has_a_scale_or_blocks_for_each() -> None:
    codes = torch.tensor(RNG.normal(size=(2, 32, 16)) * 50).to(torch.float8_e4m3fn)
    for shape in ((2,), (2, 2, 1)):
        factors = torch.tensor(RNG.uniform(0.5, 2, shape).astype(np.float32))
        found = decoded(
            {"gate_up_proj": codes, "gate_up_proj_scale_inv": factors},
            quantization_config={"weight_block_size": [16, 16]},
        )
        for expert in range(2):
            for row in range(32):
                factor = factors[expert] if shape == (2,) else factors[expert, row // 16, 0]
                expected = codes[expert, row].double().numpy() * float(factor)
                np.testing.assert_allclose(found["gate_up_proj"][expert, row], expected, rtol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_is_packed_eight_to_a_word(symmetric: bool) -> None:
    codes = RNG.integers(0, 16, (16, 32))
    scales = RNG.uniform(0.5, 2, (16, 2)).astype(np.float32)
    points = np.full((16, 2), 8) if symmetric else RNG.integers(0, 16, (16, 2))
    shifts = 1 << (4 * np.arange(8))
    packed = (codes.reshape(16, 4, 8) * shifts).sum(-1).astype(np.uint32).view(np.int32)
    tensors = {
        "a.weight_packed": torch.tensor(packed),
        "a.weight_scale": torch.tensor(scales),
        "a.weight_shape": torch.tensor([16, 32]),
    }
    if not symmetric:
        words = (points.reshape(2, 8, 2) * shifts[:, None]).sum(1).astype(np.uint32).view(np.int32)
        tensors["a.weight_zero_point"] = torch.tensor(words)
    expected = (codes - points.repeat(16, 1)) * scales.repeat(16, 1)
    np.testing.assert_allclose(decoded(tensors)["a.weight"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("names", "dtype"),
    [(("a.weight_packed", "a.weight_scale"), torch.uint8), (("a.weight", "a.scale"), torch.int8)],
)
def test_mxfp4_of_an_expert_alone_keeps_its_rows(names: tuple[str, str], dtype: torch.dtype) -> None:
    codes, exponents = RNG.integers(0, 16, (8, 64)), RNG.integers(120, 130, (8, 2))
    packed = torch.tensor(codes[:, 0::2] | codes[:, 1::2] << 4, dtype=torch.uint8).view(dtype)
    scale = torch.tensor(exponents, dtype=torch.uint8)
    expected = FP4[codes] * 2.0 ** (exponents.repeat(32, 1) - 127)
    np.testing.assert_array_equal(
        decoded(dict(zip(names, (packed, scale), strict=True)))["a.weight"], expected
    )


def test_gpt_oss_blocks_are_transposed() -> None:
    codes, exponents = RNG.integers(0, 16, (1, 6, 64)), RNG.integers(120, 130, (1, 6, 2))
    packed = torch.tensor(codes[..., 0::2] | codes[..., 1::2] << 4, dtype=torch.uint8).view(1, 6, 2, 16)
    tensors = {"down_proj_blocks": packed, "down_proj_scales": torch.tensor(exponents, dtype=torch.uint8)}
    expected = (FP4[codes] * 2.0 ** (exponents.repeat(32, -1) - 127)).transpose(0, 2, 1)
    np.testing.assert_array_equal(decoded(tensors)["down_proj"], expected)


REFUSED = {
    "nvfp4": {"a.weight": torch.zeros(4, 4, dtype=torch.uint8), "a.weight_scale_2": torch.zeros(1)},
    "awq": {"a.qweight": torch.zeros(4, 4, dtype=torch.int32), "a.scales": torch.zeros(4)},
    "int4 in another order": {
        "a.weight_packed": torch.zeros(4, 4, dtype=torch.int32),
        "a.weight_scale": torch.zeros(4, 1),
        "a.weight_g_idx": torch.zeros(32, dtype=torch.int32),
    },
    "fp8 without a scale": {"a.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)},
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_quantisations_are_refused_by_name(case: str) -> None:
    with pytest.raises(InvalidInputError, match=r"here: tensor 'a\..*' is stored as .* not decoded here"):
        decoded(REFUSED[case])


def test_eight_bits_are_not_read_as_four() -> None:
    tensors = {"a.weight_packed": torch.zeros(4, 4, dtype=torch.int32), "a.weight_scale": torch.zeros(4, 1)}
    groups = {"group_0": {"weights": {"num_bits": 8}}}
    with pytest.raises(InvalidInputError, match="not decoded here"):
        decoded(tensors, quantization_config={"config_groups": groups})
