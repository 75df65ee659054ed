"""A model like DeepSeek-V4, with a table of experts by token."""

from __future__ import annotations

import random
import struct

from tests.support.per_expert import Tensor, Tensors, tensor

EXPERTS, TOP_K, VOCABULARY, HIDDEN = 8, 3, 40, 16
TABLE = "layers.0.ffn.gate.tid2eid"
CODES = {"I64": "q", "I32": "i"}


def table(dtype: str, seed: int = 0) -> Tensor:
    rng = random.Random(seed)
    values = [e for _ in range(VOCABULARY) for e in rng.sample(range(EXPERTS), TOP_K)]
    return dtype, (VOCABULARY, TOP_K), struct.pack(f"<{len(values)}{CODES[dtype]}", *values)


def values(stored: Tensor) -> list[tuple[int, ...]]:
    found = struct.unpack(f"<{VOCABULARY * TOP_K}{CODES[stored[0]]}", stored[2])
    return [found[i : i + TOP_K] for i in range(0, len(found), TOP_K)]


def model(dtype: str = "I64") -> Tensors:
    """Two layers, the first routed by a table, the second by scores; FP4 as two codes a byte."""
    rng = random.Random(1)
    tensors = {"embed.weight": tensor(rng, "BF16", (VOCABULARY, HIDDEN))}
    for layer in range(2):
        prefix = f"layers.{layer}.ffn."
        tensors[prefix + "gate.weight"] = tensor(rng, "BF16", (EXPERTS, HIDDEN))
        for expert in range(EXPERTS):
            for name in ("w1", "w2", "w3"):
                tensors[f"{prefix}experts.{expert}.{name}.weight"] = tensor(rng, "I8", (HIDDEN, HIDDEN // 2))
                tensors[f"{prefix}experts.{expert}.{name}.scale"] = tensor(rng, "F8_E8M0", (HIDDEN, 1))
    tensors["layers.1.ffn.gate.bias"] = tensor(rng, "F32", (EXPERTS,))
    tensors[TABLE] = table(dtype)
    return tensors


CONFIG = {
    "model_type": "deepseek_v4",
    "num_hidden_layers": 2,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
}
