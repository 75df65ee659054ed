"""A small model, two rankings of its experts, and what a sweep of them leaves on the disk."""

from __future__ import annotations

import random
from pathlib import Path

from moe_surgery.selection.ranking import Ranking
from tests.support.checkpoints import Shape

SHAPE = Shape(layers=3, experts=8, top_k=2)
COUNTS = (2, 5, 8)


def ranking(seed: int, layers: int = 3, experts: int = 8, model_type: str | None = "gpt_oss") -> Ranking:
    shuffled = random.Random(seed)
    rows = tuple(tuple(shuffled.sample(range(experts), experts)) for _ in range(layers))
    return Ranking(experts, rows, model_type, provenance={"method": f"shuffled {seed}"})


RANKINGS = [("law", ranking(0)), ("math", ranking(1))]
NAMES = [f"{name}-{n}" for name in ("law", "math") for n in COUNTS]


def dense_file(folder: Path) -> Path:
    return folder / "model-00001-of-00002.safetensors"


def disk_bytes(folder: Path) -> int:
    """As `du --apparent-size` counts: a file with several names once."""
    files = {(s.st_dev, s.st_ino): s.st_size for f in folder.rglob("*") if f.is_file() for s in [f.stat()]}
    return sum(files.values())
