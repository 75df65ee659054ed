"""Checkpoints with F16 and F32 weights: kept bit for bit, and converted as by torch and in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from moe_surgery import inspect, plan_keeping, prune, verify
from moe_surgery.families.model_spec import ModelSpec
from moe_surgery.formats.expert_format import FORMATS
from moe_surgery.selection.plan import Plan
from tests.support.checkpoints import (
    E2M1,
    Shape,
    Tensors,
    assert_same_tensors,
    decode,
    decode_transposed,
    kept_tensors,
    load_config,
    load_tensors,
    write_checkpoint,
)
from tests.support.command import call
from tests.support.floats import as_float64, in_dtype, is_dense, is_expert_weight

torch = pytest.importorskip("torch")

Capture = pytest.CaptureFixture[str]
Edit = Callable[[Tensors], None]
KEPT = (3, 0, 2)
DENSE = ("bf16", "f16", "f32")
EACH_ONCE = {("f32", "bf16"), ("bf16", "f16"), ("f16", "f32")}
SHAPES = {
    "small": Shape(),
    "beyond a chunk": Shape(layers=1, hidden=1120, intermediate=1312, vocabulary=40),
}


def both(first: Edit, second: Edit) -> Edit:
    def edit(tensors: Tensors) -> None:
        first(tensors)
        second(tensors)

    return edit


MIXES: Mapping[str, Edit] = {
    "all f16": in_dtype("f16"),
    "all f32": in_dtype("f32"),
    "f16 experts": in_dtype("f16", is_expert_weight),
    "f32 experts": in_dtype("f32", is_expert_weight),
    "f16 experts, f32 others": both(in_dtype("f16", is_expert_weight), in_dtype("f32", is_dense)),
    "f32 router and norms": in_dtype("f32", lambda n: "router" in n or "norm" in n),
}


def keep(model: ModelSpec) -> Plan:
    return plan_keeping(KEPT, model)


def expected_of(source: Path) -> Tensors:
    tensors = load_tensors(source)
    return kept_tensors(tensors, [KEPT] * (1 + max(int(n.split(".")[2]) for n in tensors if ".layers." in n)))


@pytest.mark.parametrize(
    ("mix", "shape", "shards"),
    [
        *((mix, "small", shards) for mix in MIXES for shards in (1, 3)),
        *(
            pytest.param(mix, "beyond a chunk", 3, marks=() if "others" in mix else pytest.mark.slow)
            for mix in MIXES
        ),
    ],
)
def test_kept_weights_are_the_sources_bytes(mix: str, shape: str, shards: int, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", SHAPES[shape], "bf16", shards=shards, edit_tensors=MIXES[mix])
    prune(source, tmp_path / "out", keep, max_shard_size=4_000_000)
    assert_same_tensors(load_tensors(tmp_path / "out"), expected_of(source))
    assert "quantization_config" not in load_config(tmp_path / "out")
    assert verify(tmp_path / "out", source=source).ok


def test_dense_f32_beside_mxfp4_experts(tmp_path: Path) -> None:
    others = in_dtype("f32", lambda n: not n.endswith(("_blocks", "_scales")))
    source = write_checkpoint(tmp_path / "in", edit_tensors=others)
    prune(source, tmp_path / "out", keep)
    assert_same_tensors(load_tensors(tmp_path / "out"), expected_of(source))
    assert verify(tmp_path / "out", source=source).ok


def converted(value: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 values as torch rounds them."""
    in_float32 = torch.from_numpy(as_float64(value).astype(np.float32))
    if dtype == "bf16":
        return in_float32.bfloat16().view(torch.int16).numpy().view(np.uint16)
    return (in_float32.half() if dtype == "f16" else in_float32).numpy()


@pytest.mark.parametrize(
    ("stored", "target", "shape"),
    [
        *((*pair, "small") for pair in product(DENSE, DENSE)),
        *(
            pytest.param(*pair, "beyond a chunk", marks=() if pair in EACH_ONCE else pytest.mark.slow)
            for pair in product(DENSE, DENSE)
        ),
    ],
)
def test_dense_formats_are_rounded_once_as_torch_rounds(
    stored: str, target: str, shape: str, tmp_path: Path
) -> None:
    edit = in_dtype(stored, is_expert_weight)
    source = write_checkpoint(tmp_path / "in", SHAPES[shape], "bf16", shards=2, edit_tensors=edit)
    result = prune(source, tmp_path / "out", keep, store=target, max_shard_size=4_000_000)
    expected = {n: converted(v, target) if is_expert_weight(n) else v for n, v in expected_of(source).items()}
    assert_same_tensors(load_tensors(tmp_path / "out"), expected)
    assert result.program.expert_format.name == target
    assert json.loads((tmp_path / "out" / "surgery.json").read_text())["expert_storage"] == target
    assert verify(tmp_path / "out", source=source).ok


@pytest.mark.parametrize(
    ("target", "layout", "shape"),
    [
        *product(("f16", "f32"), ("mxfp4", "original"), ("small",)),
        ("f16", "mxfp4", "beyond a chunk"),
        ("f32", "original", "beyond a chunk"),
        pytest.param("f16", "original", "beyond a chunk", marks=pytest.mark.slow),
        pytest.param("f32", "mxfp4", "beyond a chunk", marks=pytest.mark.slow),
    ],
)
def test_mxfp4_decodes_to_f16_and_f32(target: str, layout: str, shape: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", SHAPES[shape], layout, shards=2)
    prune(source, tmp_path / "out", keep, store=target)
    hub = write_checkpoint(tmp_path / "hub", SHAPES[shape])
    expected = expected_of(hub)
    for name in [n for n in expected if n.endswith("_blocks")]:
        base = name.removesuffix("_blocks")
        bits = decode_transposed(expected.pop(name), expected.pop(base + "_scales"))
        expected[base] = converted(bits, target)
    assert_same_tensors(load_tensors(tmp_path / "out"), expected)
    assert "quantization_config" not in load_config(tmp_path / "out")
    assert verify(tmp_path / "out", source=source).ok


@pytest.mark.parametrize(
    ("stored", "shape"),
    [
        ("f16", "small"),
        ("f32", "small"),
        ("f32", "beyond a chunk"),
        pytest.param("f16", "beyond a chunk", marks=pytest.mark.slow),
    ],
)
def test_mxfp4_codes_are_the_nearest_to_the_stored_values(stored: str, shape: str, tmp_path: Path) -> None:
    edit = in_dtype(stored, is_expert_weight)
    source = write_checkpoint(tmp_path / "in", SHAPES[shape], "bf16", shards=2, edit_tensors=edit)
    outcome = prune(source, tmp_path / "out", keep, store="mxfp4", max_shard_size=4_000_000).outcome
    got, error_sq, norm_sq, blocks_seen = load_tensors(tmp_path / "out"), 0.0, 0.0, 0
    for name, value in expected_of(source).items():
        if not is_expert_weight(name):
            assert got[name].tobytes() == value.tobytes()
            continue
        blocks, scales = got[name + "_blocks"], got[name + "_scales"]
        x = np.swapaxes(as_float64(value), 1, 2)
        error = np.abs(x - as_float64(decode(blocks, scales)))
        last = scales[-1].astype(int)[..., None]  # of one expert, which a chunk's border cuts
        grid = np.ldexp(E2M1.astype(np.float64), last - 127).repeat(32, axis=-2)
        assert (error[-1] == np.abs(np.abs(x[-1])[..., None] - grid).min(axis=-1)).all(), name
        error_sq, norm_sq = error_sq + (error**2).sum(), norm_sq + (x**2).sum()
        blocks_seen += scales.size
    assert outcome is not None
    assert outcome.conversion is not None
    assert outcome.conversion["blocks"] == blocks_seen
    assert outcome.conversion["relative_error"] == pytest.approx((error_sq / norm_sq) ** 0.5, rel=1e-5)
    assert load_config(tmp_path / "out")["quantization_config"]
    assert verify(tmp_path / "out", source=source).ok


@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_from_mxfp4_and_back_nothing_is_lost(dtype: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in")
    prune(source, tmp_path / "dense", keep, store=dtype)
    back = prune(tmp_path / "dense", tmp_path / "out", lambda m: plan_keeping(None, m), store="mxfp4")
    assert back.outcome is not None
    assert back.outcome.conversion is not None
    assert back.outcome.conversion["inexact_blocks"] == 0
    got, expected = load_tensors(tmp_path / "out"), expected_of(source)
    for name in (n for n in expected if n.endswith("_blocks")):
        scales = name.replace("_blocks", "_scales")
        np.testing.assert_array_equal(
            decode(got[name], got[scales]), decode(expected[name], expected[scales])
        )


@pytest.mark.parametrize(("dtype", "value"), [("f16", 65520.0), ("bf16", 3.4e38)])
def test_a_weight_too_large_for_the_target_is_refused_and_nothing_left(
    dtype: str, value: float, tmp_path: Path, capsys: Capture
) -> None:
    name = "model.layers.1.mlp.experts.down_proj"

    def edit(tensors: Tensors) -> None:
        in_dtype("f32")(tensors)
        tensors[name][2, 5, 7] = -value

    source = write_checkpoint(tmp_path / "in", None, "bf16", edit_tensors=edit)
    done = call(capsys, "prune", source, tmp_path / "out", "--keep", "0,2", "--store", dtype)
    assert done.code == 3
    assert f"tensor '{name}': 1 values, up to {value:.6g}, are too large for {dtype.upper()}" in done.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
    done = call(capsys, "prune", source, tmp_path / "out", "--keep", "0,1", "--store", dtype)
    assert done.code == 0, done.err  # the expert with that weight is gone


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_weight_that_mxfp4_cannot_hold_is_named(wrong: float, tmp_path: Path, capsys: Capture) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"

    def edit(tensors: Tensors) -> None:
        in_dtype("f32")(tensors)
        tensors[name][1, 40, 3] = wrong

    source = write_checkpoint(tmp_path / "in", None, "bf16", edit_tensors=edit)
    done = call(capsys, "prune", source, tmp_path / "out", "--keep", "1", "--store", "mxfp4")
    assert done.code == 3
    assert f"tensor '{name}'" in done.err
    assert "row 3, block 1" in done.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_experts_in_two_dense_formats_are_refused_naming_one_of_each(tmp_path: Path, capsys: Capture) -> None:
    edit = in_dtype("f32", lambda n: n.endswith("down_proj"))
    source = write_checkpoint(tmp_path / "in", None, "bf16", edit_tensors=edit)
    done = call(capsys, "inspect", source)
    assert done.code == 3
    assert "gate_up_proj' is stored as BF16" in done.err
    assert "down_proj' as F32: all expert weights must have the same format" in done.err


@pytest.mark.parametrize("stored", ["f16", "f32"])
def test_inspect_says_dtypes_and_foretells_bytes(stored: str, tmp_path: Path, capsys: Capture) -> None:
    source = write_checkpoint(tmp_path / "in", None, "bf16", edit_tensors=in_dtype(stored))
    result = inspect(source)
    tensors = load_tensors(source)
    assert result.dtypes == {stored.upper(): sum(t.nbytes for t in tensors.values())}
    assert result.sizes[-1].nbytes(result.expert_format) == result.nbytes
    for dtype in FORMATS:
        program = prune(source, tmp_path / "out", keep, store=dtype, dry_run=True).program
        planned = sum(t.nbytes for s in program.shards for t in s.tensors)
        assert result.sizes[2].nbytes(FORMATS[dtype]) == planned
    message = call(capsys, "inspect", source, "--json").json()
    assert message["expert_storage"] == stored
    assert message["sizes"][-1][f"{stored}_bytes"] == result.nbytes
    assert set(message["fits"]["8"]) == {"mxfp4", "bf16", stored}
    shown = call(capsys, "inspect", source).out
    assert f"stored as {stored.upper()}" in shown


def test_a_plan_for_a_size_counts_the_stored_format(tmp_path: Path, capsys: Capture) -> None:
    source = write_checkpoint(tmp_path / "in", None, "bf16", edit_tensors=in_dtype("f32", is_expert_weight))
    sizes = inspect(source).sizes
    for dtype, fmt in (("keep", "f32"), ("f16", "f16"), ("mxfp4", "mxfp4")):
        limit = sizes[1].nbytes(FORMATS[fmt])
        arguments = ["--random", source, "--store", dtype, "--target-size", str(limit)]
        plan = call(capsys, "plan", *arguments).json()
        assert {len(kept) for kept in plan["layers"]} == {2}


SENTENCES = {
    ("f32", "keep"): "The kept weights are those of the source, byte for byte.",
    ("f32", "bf16"): "Expert weights were rounded from F32 to BF16, to nearest (ties to even)",
    ("f16", "bf16"): "Expert weights were rounded from F16 to BF16, to nearest (ties to even)",
    ("f16", "f32"): "Expert weights were converted from F16 to F32, which is lossless",
    ("f16", "mxfp4"): "Expert weights were converted from F16 to MXFP4 (`conversion` in `surgery.json` has",
}


@pytest.mark.parametrize(("stored", "dtype"), SENTENCES)
def test_the_card_says_how_weights_were_converted(stored: str, dtype: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", None, "bf16", edit_tensors=in_dtype(stored))
    result = prune(source, tmp_path / "out", keep, store=dtype)
    card = (tmp_path / "out" / "README.md").read_text()
    assert SENTENCES[stored, dtype] in card
    here = stored if dtype == "keep" else dtype
    assert f"| expert weights | {here.upper()}" in card
    if here != "mxfp4":
        tensors = sum(t.nbytes for s in result.program.shards for t in s.tensors)
        assert f"The weights take {tensors / 1000:.2f} kB of memory on any device." in card
