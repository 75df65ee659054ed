"""Small random checkpoints in which every part of the model shows in the logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.support.checkpoints import Shape, Tensors, make_config, make_tensors, write_folder

Config = dict[str, object]
LOUDER = {"norm": 4, "sinks": 4, "router.weight": 2, "gate.weight": 2}


def write_lively(
    folder: Path,
    shape: Shape,
    layout: str = "mxfp4",
    *,
    seed: int = 0,
    shards: int = 1,
    edit_tensors: Callable[[Tensors], object] | None = None,
    edit_config: Callable[[Config], object] | None = None,
) -> Path:
    """Like `write_checkpoint`, with weights of about the size that training gives them."""
    tensors, config = make_tensors(shape, layout, seed, scales=(121, 124)), make_config(shape, layout)
    for name, value in tensors.items():
        for part, doublings in LOUDER.items():
            if part in name:
                tensors[name] = times(value, doublings)
    if edit_tensors:
        edit_tensors(tensors)
    if edit_config:
        edit_config(config)
    return write_folder(folder, tensors, config, shards=shards, seed=seed)


def times(bits: np.ndarray, doublings: int) -> np.ndarray:
    """BF16 values times 2^doublings, none of them 0 or large."""
    return (bits + (doublings << 7)).astype(np.uint16)
