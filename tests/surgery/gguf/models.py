"""Tiny models that the tests of this folder prune, and shortcuts."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

from moe_surgery import Plan, prune
from moe_surgery.families.model_spec import ModelSpec
from moe_surgery.pipeline.pruning import PruneResult
from tests.support.raw_gguf import Entry, TinyMoe, write

GPT_OSS = TinyMoe(
    "gpt-oss",
    biases=True,
    expert_type="MXFP4",
    extra={"ffn_gate_inp.bias": ("F32", (8,))},
    keys={"gpt-oss.expert_feed_forward_length": ("u32", 64)},
)
DEEPSEEK = TinyMoe(
    "deepseek2",
    blocks=4,
    dense=1,
    mtp=1,
    selection_bias="exp_probs_b.bias",
    keys={
        "deepseek2.expert_group_count": ("u32", 2),
        "deepseek2.expert_group_used_count": ("u32", 1),
        "deepseek2.expert_feed_forward_length": ("u32", 64),
    },
    extra={"ffn_up_shexp.weight": ("F16", (32, 8)), "ffn_gate_inp_shexp.weight": ("F32", (8,))},
)
GEMMA4 = TinyMoe(
    "gemma4",
    fused=True,
    extra={"ffn_down_exps.scale": ("F32", (8,)), "ffn_gate_inp.scale": ("F32", (32,))},
)
HASHED = TinyMoe("deepseek4", top_k=3, extra={"ffn_gate_tid2eid.weight": ("I32", (3, 50))})


def write_hashed(path: Path, seed: int = 1) -> Path:
    """`HASHED` with tables of valid numbers, which differ in a row."""
    rng = random.Random(seed)
    tensors = [
        t._replace(data=struct.pack("<150i", *(e for _ in range(50) for e in rng.sample(range(8), 3))))
        if "tid2eid" in t.name
        else t
        for t in HASHED.tensors(seed)
    ]
    return write(path, HASHED.entries(), tensors)


def rows(
    *kept: Sequence[int], top_k: int | None = None, mtp: Sequence[Sequence[int]] | None = None
) -> Callable[[ModelSpec], Plan]:
    """A plan with `kept` of each MoE layer; one row counts for all."""

    def plan(model: ModelSpec) -> Plan:
        each = kept if len(kept) > 1 else kept * model.layers
        numbers = model.layer_numbers
        return Plan(
            model.model_type,
            model.experts,
            tuple(map(tuple, each)),
            top_k,
            layer_numbers=() if numbers == tuple(range(len(numbers))) else numbers,
            mtp_layers=None if mtp is None else tuple(map(tuple, mtp)),
        )

    return plan


def pruned(source: Path, out: Path, *kept: Sequence[int], **options: object) -> PruneResult:
    """`source` with `kept` of each layer as `out`."""
    return prune(source, out, rows(*kept), **options)  # type: ignore[arg-type]


def unsplit(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Without the keys of a split set, and without our own."""
    return {k: e for k, e in entries.items() if not k.startswith(("split.", "moe_surgery."))}
