"""A merged weight is W + scale * B @ A, rounded once; everything else keeps its bytes."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from moe_surgery import Progress, merge_adapter, plan_keeping, prune, verify
from moe_surgery.errors import MoeSurgeryError
from tests.support.adapters import (
    EXPERTS,
    assert_rounded,
    best_error,
    delta,
    factors,
    stacked_delta,
    write_adapter,
)
from tests.support.checkpoints import (
    Shape,
    Tensors,
    decode,
    load_tensors,
    make_tensors,
    to_bf16,
    write_checkpoint,
)
from tests.support.floats import as_float64

SHAPE = Shape(layers=2, experts=4, hidden=64, intermediate=96)
Q = "model.layers.0.self_attn.q_proj"
ROUTER = "model.layers.1.mlp.router"
RANK = 4


def dense_factors() -> Tensors:
    heads = SHAPE.heads * SHAPE.head_dim
    return {
        **factors(Q, RANK, SHAPE.hidden, heads),
        **factors("model.layers.1.self_attn.o_proj", RANK, heads, SHAPE.hidden),
        **factors("lm_head", RANK, SHAPE.hidden, SHAPE.vocabulary),
    }


def stacked_factors(experts: int = SHAPE.experts, layer: int = 1, size: float = 0.1) -> Tensors:
    """On gate_up_proj (inner) and down_proj (outer) of one layer, as PEFT nests them."""
    module = EXPERTS.format(layer)
    ranks = RANK * experts
    return {
        **factors(f"{module}.base_layer", ranks, SHAPE.hidden, 2 * SHAPE.intermediate, size=size),
        **factors(module, ranks, SHAPE.intermediate, SHAPE.hidden, size=size),
    }


def merged(
    tmp_path: Path, adapter: Tensors, layout: str = "mxfp4", **options: object
) -> tuple[Tensors, Tensors]:
    """(source in BF16, output) of merging `adapter` into a checkpoint of `layout`; the output verifies."""
    source = write_checkpoint(tmp_path / "in", SHAPE, layout)
    lora = write_adapter(tmp_path / "lora", adapter, RANK, **options.pop("config", {}))  # type: ignore[arg-type]
    result = merge_adapter(lora, source, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert result.outcome is not None
    check = verify(tmp_path / "out", source=source, adapter=lora)
    assert check.ok, check.problems
    plain = verify(tmp_path / "out", source=source)
    assert plain.ok, plain.problems
    assert sum("hold the merged adapter" in note for note in plain.notes) == 1
    return to_bf16(make_tensors(SHAPE)), load_tensors(tmp_path / "out")


def unchanged(before: Tensors, after: Tensors, *changed: str) -> None:
    for name in before.keys() - set(changed):
        assert after[name].tobytes() == before[name].tobytes(), name


@pytest.mark.parametrize("layout", ["mxfp4", "bf16", "original"])
def test_dense_layers(tmp_path: Path, layout: str) -> None:
    adapter = dense_factors()
    source, out = merged(tmp_path, adapter, layout)
    modules = sorted({name.partition(".lora_")[0] for name in adapter})
    for module in modules:
        name = module + ".weight"
        assert_rounded(out[name], as_float64(source[name]) + delta(adapter, module))
    packed = make_tensors(SHAPE) if layout != "bf16" else source
    unchanged(packed, out, *(f"{m}.weight" for m in modules))


@pytest.mark.parametrize("order", ["peft", "expert"])
def test_stacked_experts_in_bf16(tmp_path: Path, order: str) -> None:
    adapter, module = stacked_factors(), EXPERTS.format(1)
    source, out = merged(tmp_path, adapter, store="bf16", rank_order=order)
    names = {f"{module}.base_layer": f"{module}.gate_up_proj", module: f"{module}.down_proj"}
    for lora, name in names.items():
        added = stacked_delta(adapter, lora, SHAPE.experts, order=order).swapaxes(1, 2)
        assert_rounded(out[name], as_float64(source[name]) + added)
    unchanged(source, out, *names.values())


def test_a_float_format_gets_the_float32_sum(tmp_path: Path) -> None:
    adapter, module = stacked_factors(), EXPERTS.format(1)
    source, out = merged(tmp_path, adapter, "bf16", store="f32")
    name = f"{module}.down_proj"
    expected = as_float64(source[name]) + stacked_delta(adapter, module, SHAPE.experts).swapaxes(1, 2)
    margin = np.spacing(np.float32(np.abs(expected).max()))
    np.testing.assert_allclose(out[name], expected, rtol=0, atol=margin)


@pytest.mark.parametrize("layout", ["mxfp4", "bf16"])
@pytest.mark.parametrize("size", [0.02, 0.3])
def test_packed_again_with_nearly_the_least_error(tmp_path: Path, size: float, layout: str) -> None:
    """Beside the best of all scales for each block, tried one by one in float64."""
    adapter, module = stacked_factors(size=size), EXPERTS.format(1)
    source, out = merged(tmp_path, adapter, layout, store="mxfp4")
    best = got = 0.0
    for lora, name in ((f"{module}.base_layer", "gate_up_proj"), (module, "down_proj")):
        base = as_float64(source[f"{module}.{name}"]).swapaxes(1, 2)
        wanted = base + stacked_delta(adapter, lora, SHAPE.experts)
        blocks, scales = (out[f"{module}.{name}_{part}"] for part in ("blocks", "scales"))
        best += best_error(wanted)
        got += float(((as_float64(decode(blocks, scales)) - wanted) ** 2).sum())
    assert best <= got * (1 + 1e-12)
    assert got <= 1.01 * best
    if layout == "mxfp4":
        untouched = [n for n in make_tensors(SHAPE) if not n.startswith(module) or n.endswith("bias")]
        unchanged({n: make_tensors(SHAPE)[n] for n in untouched}, out)


def test_the_router_and_biases_of_experts(tmp_path: Path) -> None:
    module = EXPERTS.format(1)
    adapter = {
        **factors(ROUTER, RANK, SHAPE.hidden, SHAPE.experts),
        **factors(module, RANK, SHAPE.hidden, SHAPE.experts),  # the only target: down_proj_bias
    }
    config = {"target_parameters": ["mlp.router.weight", "experts.down_proj_bias"]}
    source, out = merged(tmp_path, adapter, config=config)
    for lora, name in ((ROUTER, f"{ROUTER}.weight"), (module, f"{module}.down_proj_bias")):
        assert_rounded(out[name], as_float64(source[name]) + delta(adapter, lora))
    unchanged(make_tensors(SHAPE), out, f"{ROUTER}.weight", f"{module}.down_proj_bias")


@pytest.mark.parametrize("spelling", ["gate_up_projs.{}", "{}.gate_up_proj"])
def test_single_experts(tmp_path: Path, spelling: str) -> None:
    """The others keep their bytes, in the same tensor too."""
    module, experts = EXPERTS.format(0), (0, 2)
    names = {e: f"{module}.{spelling.format(e)}" for e in experts}
    adapter = {}
    for name in names.values():
        adapter |= factors(name, RANK, SHAPE.hidden, 2 * SHAPE.intermediate)
    _, out = merged(tmp_path, adapter)
    before = make_tensors(SHAPE)
    blocks, scales = f"{module}.gate_up_proj_blocks", f"{module}.gate_up_proj_scales"
    for expert in range(SHAPE.experts):
        wanted = as_float64(decode(before[blocks][expert], before[scales][expert]))
        if expert not in names:
            assert out[blocks][expert].tobytes() == before[blocks][expert].tobytes()
            assert out[scales][expert].tobytes() == before[scales][expert].tobytes()
            continue
        wanted += delta(adapter, names[expert])
        error = ((as_float64(decode(out[blocks][expert], out[scales][expert])) - wanted) ** 2).sum()
        assert error <= 1.01 * best_error(wanted)
    unchanged(before, out, blocks, scales)


def test_gate_and_up_of_one_expert_lie_interleaved(tmp_path: Path) -> None:
    module = EXPERTS.format(0)
    adapter = {
        **factors(f"{module}.3.gate_proj", RANK, SHAPE.hidden, SHAPE.intermediate),
        **factors(f"{module}.3.up_proj", RANK, SHAPE.hidden, SHAPE.intermediate),
    }
    source, out = merged(tmp_path, adapter, store="bf16")
    name = f"{module}.gate_up_proj"
    wanted = as_float64(source[name])
    wanted[3, :, ::2] += delta(adapter, f"{module}.3.gate_proj").T
    wanted[3, :, 1::2] += delta(adapter, f"{module}.3.up_proj").T
    assert_rounded(out[name], wanted)
    assert out[name][:3].tobytes() == source[name][:3].tobytes()


def test_scales_of_rslora_and_patterns(tmp_path: Path) -> None:
    o = "model.layers.1.self_attn.o_proj"
    heads = SHAPE.heads * SHAPE.head_dim
    adapter = {**factors(Q, 9, SHAPE.hidden, heads), **factors(o, RANK, heads, SHAPE.hidden)}
    config = {
        "use_rslora": True,
        "lora_alpha": 6,
        "rank_pattern": {"q_proj": 9},
        "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 5},
    }
    source, out = merged(tmp_path, adapter, config=config)
    for module, scale in ((Q, 5 / 3), (o, 6 / 2)):
        assert_rounded(
            out[f"{module}.weight"], as_float64(source[f"{module}.weight"]) + delta(adapter, module, scale)
        )


def test_saved_modules_and_biases(tmp_path: Path) -> None:
    """modules_to_save replaces a tensor, lora_bias adds to one, bias "all" replaces one."""
    rng = np.random.default_rng(5)
    heads = SHAPE.heads * SHAPE.head_dim

    def values(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    adapter = {
        **factors(Q, RANK, SHAPE.hidden, heads),
        f"{Q}.lora_B.bias": values(heads),
        "lm_head.weight": values(SHAPE.vocabulary, SHAPE.hidden),
        f"{ROUTER}.weight": values(SHAPE.experts, SHAPE.hidden),
        "model.layers.1.self_attn.v_proj.base_layer.bias": values(SHAPE.kv_heads * SHAPE.head_dim),
        f"{EXPERTS.format(0)}.down_proj": values(SHAPE.experts, SHAPE.intermediate, SHAPE.hidden),
    }
    source, out = merged(tmp_path, adapter, store="bf16", config={"lora_bias": True, "bias": "all"})
    assert_rounded(out[f"{Q}.bias"], as_float64(source[f"{Q}.bias"]) + 2.0 * adapter[f"{Q}.lora_B.bias"])
    for name in ("lm_head.weight", f"{ROUTER}.weight", f"{EXPERTS.format(0)}.down_proj"):
        assert_rounded(out[name], adapter[name], ulps=0)
    name = "model.layers.1.self_attn.v_proj.bias"
    assert_rounded(out[name], adapter[name.replace("v_proj", "v_proj.base_layer")], ulps=0)


# --- pruned checkpoints


@pytest.mark.parametrize("mapping", ["both", "expert_mapping.json", "surgery.json"])
def test_an_adapter_of_the_full_model_meets_the_experts_that_are_left(tmp_path: Path, mapping: str) -> None:
    kept = [3, 1]
    full = write_checkpoint(tmp_path / "full", SHAPE)
    pruned = tmp_path / "pruned"
    prune(full, pruned, lambda model: plan_keeping(kept, model))
    for name in {"expert_mapping.json", "surgery.json"} - {mapping}:
        if mapping != "both":
            (pruned / name).unlink()
    adapter = {**stacked_factors(), **factors(ROUTER, RANK, SHAPE.hidden, SHAPE.experts), **dense_factors()}
    adapter |= factors(f"{EXPERTS.format(0)}.gate_up_projs.1", RANK, SHAPE.hidden, 2 * SHAPE.intermediate)
    adapter |= factors(f"{EXPERTS.format(0)}.gate_up_projs.2", RANK, SHAPE.hidden, 2 * SHAPE.intermediate)
    lora = write_adapter(tmp_path / "lora", adapter, RANK)
    whole, small = tmp_path / "whole", tmp_path / "small"
    merge_adapter(lora, full, whole, store="bf16")
    result = merge_adapter(lora, pruned, small, store="bf16")
    assert any("were pruned" in note for note in result.notes)
    expected, got = load_tensors(whole), load_tensors(small)
    for name, values in got.items():
        wanted = expected[name][kept] if ".mlp." in name else expected[name]
        assert values.tobytes() == wanted.tobytes(), name
    if mapping != "surgery.json":
        assert json.loads((small / "expert_mapping.json").read_text())["0"] == {"3": 0, "1": 1}
    assert verify(small, source=pruned, adapter=lora).ok


def test_an_adapter_of_the_pruned_model_has_its_numbers(tmp_path: Path) -> None:
    full = write_checkpoint(tmp_path / "full", SHAPE)
    prune(full, tmp_path / "pruned", lambda model: plan_keeping([3, 1], model))
    adapter, module = stacked_factors(experts=2), EXPERTS.format(1)
    lora = write_adapter(tmp_path / "lora", adapter, RANK)
    merge_adapter(lora, tmp_path / "pruned", tmp_path / "out", store="bf16")
    name = f"{module}.down_proj"
    source = to_bf16(load_tensors(tmp_path / "pruned"))
    wanted = as_float64(source[name]) + stacked_delta(adapter, module, 2).swapaxes(1, 2)
    assert_rounded(load_tensors(tmp_path / "out")[name], wanted)


def test_numbers_that_may_be_either_need_a_word(tmp_path: Path) -> None:
    full = write_checkpoint(tmp_path / "full", SHAPE)
    prune(full, tmp_path / "pruned", lambda model: plan_keeping([3, 1], model))
    module = f"{EXPERTS.format(0)}.gate_up_projs.1"
    adapter = factors(module, RANK, SHAPE.hidden, 2 * SHAPE.intermediate)
    lora = write_adapter(tmp_path / "lora", adapter, RANK)
    with pytest.raises(MoeSurgeryError, match="experts up to 1 may be numbered as in the checkpoint or"):
        merge_adapter(lora, tmp_path / "pruned", tmp_path / "out")
    before = load_tensors(tmp_path / "pruned")[f"{EXPERTS.format(0)}.gate_up_proj_blocks"]
    for numbering, changed in (("checkpoint", 1), ("source", 1)):
        out = tmp_path / numbering
        merge_adapter(lora, tmp_path / "pruned", out, numbering=numbering)
        after = load_tensors(out)[f"{EXPERTS.format(0)}.gate_up_proj_blocks"]
        assert [e for e in range(2) if before[e].tobytes() != after[e].tobytes()] == [changed]
    only = write_adapter(
        tmp_path / "only",
        factors(module.replace(".1", ".0"), RANK, SHAPE.hidden, 2 * SHAPE.intermediate),
        RANK,
    )
    result = merge_adapter(only, tmp_path / "pruned", tmp_path / "none", numbering="checkpoint")
    assert result.outcome is not None
    with pytest.raises(MoeSurgeryError, match="changes nothing"):
        merge_adapter(only, tmp_path / "pruned", tmp_path / "nothing", numbering="source")


# --- interruptions and memory


def test_an_interrupted_merge_resumes(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", SHAPE)
    lora = write_adapter(tmp_path / "lora", {**stacked_factors(), **dense_factors()}, RANK)
    other = write_adapter(tmp_path / "other", dense_factors(), RANK)

    def stop(progress: Progress) -> None:
        if progress.done > 0.9 * progress.total:
            raise KeyboardInterrupt

    out, clean = tmp_path / "out", tmp_path / "clean"
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(lora, source, out, max_shard_size=10_000, progress=stop)
    assert not out.exists()
    fresh = merge_adapter(other, source, out, max_shard_size=10_000)  # another adapter does not resume it
    assert fresh.outcome is not None
    assert fresh.outcome.shards_resumed == ()
    assert len(fresh.stale) == 1
    resumed = merge_adapter(lora, source, out, max_shard_size=10_000, overwrite=True).outcome
    assert resumed is not None
    assert resumed.shards_resumed
    merge_adapter(lora, source, clean, max_shard_size=10_000)
    for file in clean.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name


def test_memory_does_not_grow_with_the_experts(tmp_path: Path) -> None:
    peaks = []
    for experts in (40, 120):
        shape = Shape(layers=1, experts=experts, hidden=512, intermediate=256)
        source = write_checkpoint(tmp_path / f"in-{experts}", shape)
        module = EXPERTS.format(0)
        adapter = factors(module, 2 * experts, 256, 512)
        config = {"target_parameters": ["experts.down_proj"]}
        lora = write_adapter(tmp_path / f"lora-{experts}", adapter, 2, **config)
        tracemalloc.start()
        merge_adapter(lora, source, tmp_path / f"out-{experts}", card=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + (16 << 20)  # 80 more experts have 80 MB in float64
