"""Pruning any mix of layouts: the result is what slicing each tensor by hand gives."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from moe_surgery import Plan, prune, verify
from tests.support.per_expert import BITS, Tensors, read, rows, tensor, write

DTYPES = st.sampled_from(sorted(BITS))
SHAPES = st.lists(st.integers(1, 4), max_size=3).map(tuple)
LEAVES = st.dictionaries(
    st.sampled_from(
        ["gate_proj.weight", "up_proj.qweight", "down_proj.trellis", "down_proj.weight_scale", "bias"]
    ),
    st.tuples(DTYPES, SHAPES),
    min_size=1,
)


@settings(max_examples=40, deadline=None)
@given(
    experts=st.integers(2, 5),
    layers=st.lists(
        st.tuples(st.sampled_from(["dense", "apart", "stacked"]), LEAVES), min_size=1, max_size=4
    ),
    shards=st.integers(1, 3),
    size=st.integers(1, 400),
    seed=st.integers(0, 2**32),
)
def test_every_layout_is_cut_as_by_hand(
    experts: int,
    layers: Sequence[tuple[str, dict[str, tuple[str, tuple[int, ...]]]]],
    shards: int,
    size: int,
    seed: int,
) -> None:
    if all(kind == "dense" for kind, _ in layers):
        layers = [*layers, ("apart", {"weight": ("BF16", (2, 2))})]
    rng = random.Random(seed)
    count = rng.randint(1, experts)
    tensors: Tensors = {"model.norm.weight": tensor(rng, "BF16", (4,))}
    expected = dict(tensors)
    kept: dict[int, list[int]] = {}
    for layer, (kind, leaves) in enumerate(layers):
        prefix = f"model.layers.{layer}."
        name = prefix + "input_layernorm.weight"
        tensors[name] = expected[name] = tensor(rng, "BF16", (4,))
        if kind == "dense":
            continue
        row = kept[layer] = rng.sample(range(experts), count)
        name = prefix + "mlp.gate.weight"
        tensors[name] = tensor(rng, "F32", (experts, 4))
        expected[name] = rows(tensors[name], row)
        for leaf, (dtype, shape) in leaves.items():
            if kind == "stacked":
                name = f"{prefix}mlp.experts.{leaf}"
                tensors[name] = tensor(rng, dtype, (experts, *shape))
                expected[name] = rows(tensors[name], row)
                continue
            for expert in range(experts):
                tensors[f"{prefix}mlp.experts.{expert}.{leaf}"] = tensor(rng, dtype, shape)
            for new, old in enumerate(row):
                expected[f"{prefix}mlp.experts.{new}.{leaf}"] = tensors[f"{prefix}mlp.experts.{old}.{leaf}"]
    config = {
        "model_type": "qwen3_moe",
        "num_experts": experts,
        "num_experts_per_tok": 1,
        "num_hidden_layers": len(layers),
    }
    plan = Plan("qwen3_moe", experts, tuple(map(tuple, kept.values())), layer_numbers=tuple(kept))
    if tuple(kept) == tuple(range(len(kept))):
        plan = Plan("qwen3_moe", experts, plan.layers)
    with tempfile.TemporaryDirectory() as folder:
        source = write(Path(folder) / "in", tensors, config, shards=min(shards, len(tensors)), seed=seed)
        out = Path(folder) / "out"
        prune(source, out, plan, max_shard_size=size, card=False)
        assert read(out) == expected
        assert verify(out, source=source).problems == ()
