"""Inputs that several tests of commands share."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.support.checkpoints import write_checkpoint
from tests.support.sums import arithmetic


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of two domains, and their statistics: sums.stats, talk.stats and both.stats."""
    folder = tmp_path_factory.mktemp("selection")
    (folder / "sums.txt").write_text(arithmetic(random.Random(5), 300))
    questions = [[{"role": "user", "content": f"What is {n} + {n}?"}] for n in range(4)]
    conversations = [[*s, {"role": "assistant", "content": f"{2 * n}"}] for n, s in enumerate(questions)]
    for name, lines in (("talk", conversations), ("asked", questions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in lines))
    torch = pytest.importorskip("torch")

    from moe_surgery.quality.corpus import text_files
    from moe_surgery.quality.job import profile

    sources = {"sums": ["sums.txt"], "talk": ["talk.jsonl"], "both": ["sums.txt", "talk.jsonl"]}
    for name, files in sources.items():
        out = folder / f"{name}.stats"
        profile("example:tiny", text_files([folder / f for f in files]), out, dtype=torch.float32)
    write_checkpoint(folder / "other")
    (folder / "r.json").write_text(json.dumps({f"layer_{n}": list(range(32)) for n in range(4)}))
    return folder
