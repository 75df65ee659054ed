"""Scores of experts by every metric, computed from the tensors of a statistics file."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def score(metric: str, file: Path, domains: list[str], layer: int) -> list[float]:
    """From the file's arrays, as the table of metrics has it."""
    from safetensors.numpy import load_file

    arrays = load_file(file)

    def total(name: str) -> np.ndarray:
        return sum(arrays[f"layer.{layer}.{domain}.{name}"] for domain in domains)  # type: ignore[return-value]

    count = total("count")
    chosen = np.maximum(count, 1)
    result: np.ndarray = {
        "frequency": lambda: count,
        "gate": lambda: total("gate"),
        "ean_sum": lambda: total("norm"),
        "ean_mean": lambda: total("norm") / chosen,
        "weighted_ean": lambda: total("weighted_norm"),
        "reap": lambda: total("weighted_norm") / chosen,
        "ean_ca": lambda: np.sqrt(((total("output") / chosen[:, None]) ** 2).sum(axis=1)),
    }[metric]()
    return [float(x) for x in result]
