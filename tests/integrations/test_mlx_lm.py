"""mlx-lm, on its CPU build, loads what prune writes in MXFP4 and computes what transformers computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install mlx-lm 'mlx[cpu]'")

import mlx.core as mx
import torch
from mlx_lm.utils import load_model

from moe_surgery import plan_random, prune
from moe_surgery.checkpoint.resolve import resolve
from tests.support import oracle

TOKENS = torch.randint(0, 2048, (1, 70), generator=torch.Generator().manual_seed(0))
MEDIAN_BOUND = 3e-2
"""Of the median token: products with MXFP4 weights round, and where experts nearly tie another one is chosen."""


def pruned(folder: Path, count: int, store: str = "keep") -> Path:
    if count == 32 and store == "keep":
        return resolve("example:tiny")
    prune("example:tiny", folder, lambda model: plan_random(count, 0, model), store=store)
    return folder


@pytest.mark.parametrize("count", [32, 8, 3, 1])
def test_logits_of_mxfp4_experts(count: int, tmp_path: Path) -> None:
    folder = pruned(tmp_path / "out", count)
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    logits = np.array(model(mx.array(TOKENS.numpy())))
    expected = oracle.logits_of(oracle.load_model(folder), TOKENS).numpy()
    errors = np.linalg.norm(logits - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.median(errors) <= MEDIAN_BOUND


@pytest.mark.parametrize("store", ["bf16", "f16"])
def test_other_formats_are_refused_as_the_notes_say(store: str, tmp_path: Path) -> None:
    """Once this fails, the note in surgery/serving.py and the table in the README can go."""
    folder = pruned(tmp_path / "out", 8, store)
    with pytest.raises(ValueError, match=r"parameters not in model(.|\n)*mlp\.experts\.gate_proj"):
        load_model(folder)
