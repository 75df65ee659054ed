"""Pruning by experts kept, each time beside `cp` and `sync` of the same bytes; whole processes."""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path

import pytest

from moe_surgery import inspect, plan_random
from moe_surgery.bench.surgery import Measured, command_of, copy_seconds, timed

ROUNDS = 3


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
@pytest.mark.parametrize("experts", [4, 16], ids="{} experts".format)
def test_prune(benchmark, checkpoint: str, tmp_path: Path, experts: int, dtype: str) -> None:
    """The page cache is not dropped: what it has of the source is read from memory."""
    benchmark.group = f"prune, {dtype}"
    model = inspect(checkpoint)
    if experts >= model.experts:
        pytest.skip(f"the model has {model.experts} experts")
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    plan.write_text(plan_random(experts, 0, model).to_json())
    command = command_of("prune", checkpoint, out, "--plan", plan, "--store", dtype, "-q")
    pruned: list[Measured] = []
    copied: list[Measured] = []

    def prune() -> None:
        pruned.append(timed(command, tmp_path, cold=False))

    def copy() -> None:
        benchmark.extra_info["output_bytes"] = sum(file.stat().st_size for file in out.iterdir())
        copied.append(copy_seconds(out, tmp_path / "copy", cold=False))
        shutil.rmtree(out)

    benchmark.pedantic(prune, teardown=copy, rounds=ROUNDS)
    if not benchmark.enabled:
        return
    ratios = [a.seconds / b.seconds for a, b in zip(pruned, copied, strict=True)]
    benchmark.extra_info.update(
        copy_seconds=statistics.median(m.seconds for m in copied),
        ratio_to_copy=statistics.median(ratios),
        peak_bytes=max(m.peak_bytes for m in pruned),
    )
