"""Adapters as PEFT saves them, with random factors, and what merging one means, in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.merge_error import best_error as best_error
from tests.support.checkpoints import Tensors, save_tensors
from tests.support.floats import as_float64

PREFIX = "base_model.model."
EXPERTS = "model.layers.{}.mlp.experts"


def write_adapter(folder: Path, tensors: Mapping[str, np.ndarray], rank: int = 4, **config: object) -> Path:
    """An adapter of `tensors`, whose names lack PEFT's prefix, with alpha 2 * `rank`; `config` has further keys."""
    folder.mkdir(parents=True)
    save_tensors(folder / "adapter_model.safetensors", {PREFIX + n: t for n, t in tensors.items()})
    keys = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "peft_version": "0.21.2", **config}
    (folder / "adapter_config.json").write_text(json.dumps(keys))
    return folder


def factors(module: str, rank: int, inputs: int, outputs: int, seed: int = 0, size: float = 0.1) -> Tensors:
    """lora_A [rank, inputs] and lora_B [outputs, rank] of `module`, float32."""
    rng = np.random.default_rng([seed, *module.encode()])
    shapes = {"A": (rank, inputs), "B": (outputs, rank)}
    return {
        f"{module}.lora_{factor}.weight": rng.normal(0, size, shape).astype(np.float32)
        for factor, shape in shapes.items()
    }


def delta(tensors: Tensors, module: str, scale: float = 2.0) -> np.ndarray:
    """scale * B @ A, float64 [outputs, inputs]."""
    a, b = (tensors[f"{module}.lora_{factor}.weight"].astype(np.float64) for factor in "AB")
    return scale * (b @ a)


def stacked_delta(
    tensors: Tensors, module: str, experts: int, scale: float = 2.0, order: str = "peft"
) -> np.ndarray:
    """The updates of all experts, float64 [experts, outputs, inputs], element by element as PEFT documents it."""
    a, b = (tensors[f"{module}.lora_{factor}.weight"].astype(np.float64) for factor in "AB")
    rank = a.shape[0] // experts
    result = np.zeros((experts, b.shape[0], a.shape[1]))
    for expert in range(experts):
        for k in range(rank):
            column = k * experts + expert if order == "peft" else expert * rank + k
            result[expert] += np.outer(b[:, column], a[expert * rank + k])
    return scale * result


def round_bf16(values: np.ndarray) -> np.ndarray:
    """float32 as BF16 bits, to nearest, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def assert_rounded(bits: np.ndarray, exact: np.ndarray, ulps: int = 1) -> None:
    """BF16 `bits` are `exact` rounded, up to `ulps` of float32 at its largest value (the order of a sum in float32 is
    not specified, and terms may cancel); almost all are without that."""
    assert bits.shape == exact.shape
    margin = ulps * np.spacing(np.float32(np.abs(exact).max()))
    values, wide = as_float64(bits), exact.astype(np.float64)
    assert (as_float64(round_bf16(wide - margin)) <= values).all()
    assert (as_float64(round_bf16(wide + margin)) >= values).all()
    assert np.count_nonzero(bits != round_bf16(exact)) <= 1e-4 * bits.size + 1
