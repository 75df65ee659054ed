"""Seconds and memory of one step of `repair` on the full-size checkpoint, and the time that 50,000 tokens would take.

    python -m benchmarks.repair_step --work FOLDER

Random weights of gpt-oss-20b's sizes (13.76 GB in FOLDER, made where missing), 8 of 32 random experts, passages of
random tokens. Measured: what the full model's distributions cost a token, one training step (gradient and Adam) after
one that is not counted, and a measurement on held-out texts. Memory is what the process holds resident apart from
mapped files (RssAnon), at its highest.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks.layout import gpt_oss_20b
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.publish import RESULTS, begin, heading, publish, table
from moe_surgery import inspect, load_model
from moe_surgery.families.gpt_oss.weights import WEIGHTS
from moe_surgery.quality.repair.distill import step_sizes
from moe_surgery.quality.repair.samples import Sample
from moe_surgery.quality.repair.student import Student
from moe_surgery.quality.repair.targets import compute_targets
from moe_surgery.selection.plan import plan_random

NAME = "repair_step"
TOKENS = 50_000


class PeakMemory:
    """The highest RssAnon of this process while the block runs, looked at fifty times a second."""

    def __enter__(self) -> PeakMemory:
        self.nbytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            anonymous = next(line for line in lines if line.startswith("RssAnon"))
            self.nbytes = max(self.nbytes, int(anonymous.split()[1]) * 1024)
            if self._done.wait(0.02):
                return


def timed(work: Callable[[], object]) -> tuple[float, int]:
    """Seconds and peak bytes of `work`."""
    start = time.perf_counter()
    with PeakMemory() as memory:
        work()
    return time.perf_counter() - start, memory.nbytes


def passages(vocabulary: int, count: int, tokens: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, vocabulary, (count, tokens)).tolist()
    return [Sample("random", tuple(row), 0, tokens - 1, i * (tokens - 1)) for i, row in enumerate(drawn)]


def measure(checkpoint: Path, kept: int, batch: int, context: int, steps: int, work: Path) -> dict[str, Any]:
    full = load_model(checkpoint)
    plan = plan_random(kept, 0, inspect(checkpoint))
    samples = passages(full.config.vocab_size, max(1, batch // context), context)
    tokens = sum(len(s.tokens) for s in samples)
    file = work / "repair-step.targets"
    file.unlink(missing_ok=True)
    targets_seconds, targets_bytes = timed(lambda: compute_targets(full, samples, file, "benchmark"))
    targets = compute_targets(full, samples, file, "benchmark")
    pruned = Student(full, plan, WEIGHTS, norms=True)
    sizes = step_sizes(pruned.tensors, 0.01)
    pruned.tensors.require_grad()
    adam = torch.optim.Adam([{"params": [v], "lr": sizes[n]} for n, v in pruned.tensors.values.items()])

    def step() -> None:
        pruned.divergence_and_gradient(samples, targets)
        adam.step()
        adam.zero_grad()

    measured = [timed(step) for _ in range(steps + 1)]
    seconds = sorted(s for s, _ in measured[1:])
    held_seconds, held_bytes = timed(lambda: pruned.divergences(samples, targets, batch))
    file.unlink()
    return {
        "kept": kept,
        "batch_tokens": tokens,
        "context": context,
        "steps": steps,
        "step_seconds": seconds[len(seconds) // 2],
        "step_seconds_range": [seconds[0], seconds[-1]],
        "step_bytes": max(b for _, b in measured),
        "targets_seconds_per_token": targets_seconds / tokens,
        "targets_bytes": targets_bytes,
        "measure_seconds_per_token": held_seconds / tokens,
        "measure_bytes": held_bytes,
        "trained_bytes": sum(4 * v.numel() for v in pruned.tensors.values.values()),
        "threads": torch.get_num_threads(),
    }


def page(report: dict[str, Any]) -> list[str]:
    r = report["figures"]
    training = r["step_seconds"] / r["batch_tokens"] * TOKENS * 0.8
    measuring = r["measure_seconds_per_token"] * TOKENS * 0.2
    targets = r["targets_seconds_per_token"] * TOKENS

    def hours(seconds: float) -> str:
        return f"{seconds / 3600:.2f} h" if seconds > 600 else f"{seconds:.0f} s"

    rows = [
        [
            f"one step, {r['batch_tokens']:,} tokens",
            f"{r['step_seconds']:.1f} s",
            f"{r['step_bytes'] / 2**30:.2f} GiB",
        ],
        [
            "the full model's distributions, a token",
            f"{r['targets_seconds_per_token'] * 1e3:.0f} ms",
            f"{r['targets_bytes'] / 2**30:.2f} GiB",
        ],
        [
            "a measurement, a token",
            f"{r['measure_seconds_per_token'] * 1e3:.0f} ms",
            f"{r['measure_bytes'] / 2**30:.2f} GiB",
        ],
    ]
    return [
        *heading("A step of repair at full size", report),
        "",
        f"{r['kept']} of 32 experts, passages of {r['context']} tokens, {r['threads']} threads; "
        f"{r['trained_bytes'] / 1e6:.2f} MB of small tensors in float32. Memory without mapped files.",
        "",
        *table(["", "seconds", "memory"], rows),
        "",
        f"Projected for {TOKENS:,} tokens, a fifth of them held out: {hours(targets)} for the full model's "
        f"distributions, {hours(training)} to train on all once, {hours(measuring)} for each measurement "
        "(up to twenty a run).",
    ]


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Scratch folder.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Another checkpoint of random weights.")
@click.option("--kept", default=8, show_default=True)
@click.option("--batch-tokens", default=1024, show_default=True)
@click.option("--context", default=512, show_default=True, help="Tokens of a passage.")
@click.option("--steps", default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(
    work: Path, checkpoint: Path | None, kept: int, batch_tokens: int, context: int, steps: int, out: Path
) -> None:
    full = checkpoint or work / "full"
    work.mkdir(parents=True, exist_ok=True)
    if not full.exists():
        make_checkpoint(full, gpt_oss_20b(), 3)
    flags = f"--kept {kept} --batch-tokens {batch_tokens} --context {context} --steps {steps}"
    how = f"python -m benchmarks.repair_step {flags}: random weights of gpt-oss-20b's sizes."
    report = {**begin(how, work), "figures": measure(full, kept, batch_tokens, context, steps, work)}
    publish(NAME, report, page(report), out)


if __name__ == "__main__":
    main()
