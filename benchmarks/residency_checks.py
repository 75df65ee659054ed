"""The full-size model under limits on memory: the same bits, two processes at once, a slow disk, and drafts.

    python -m benchmarks.residency_checks --work FOLDER

FOLDER/full is the full-size checkpoint of `make_checkpoint.py`, made (13.8 GB) where it is not there. Every run is a
process that reads a prompt of 24 random tokens and then single ones, and keeps all logits; the reference maps the
weights without a limit. `equal` compares runs under several limits with it, bit for bit: with few experts in memory
almost every step evicts some. `two` runs two processes at once. `slow` limits what the disk gives to a process (a
blkio cgroup; needs root). `drafts` times steps of several tokens, as checking a draft takes, beside steps of one:
reading the union of their experts is what they share. Results go to benchmarks/results/.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.cgroup import enter_command
from benchmarks.layout import gpt_oss_20b
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.publish import begin, heading, load, publish, table

NAME = "residency_checks"
PARTS = ("equal", "two", "slow", "drafts")
PROMPT, STEPS, CONTEXT = 24, 8, 256
LIMITS = (3_200_000_000, 5_000_000_000, 8_000_000_000)
HALF, DRAFT_LIMIT, SLOW_LIMIT = 6_000_000_000, 8_000_000_000, 8_000_000_000
SLOW_BYTES_PER_S = 200_000_000
TOGETHER = (1, 2, 4, 8)


def work(checkpoint: Path, out: Path | None, memory: int | None, together: tuple[int, ...]) -> dict[str, Any]:
    """Runs in a separate process: saves all logits to `out` and returns the figures, which `main` prints."""
    import torch

    from moe_surgery import load_model

    model: Any = load_model(checkpoint, memory=memory)
    cache = model.new_cache(1, CONTEXT)
    random = np.random.default_rng(5)

    def step(count: int) -> np.ndarray:
        ids = torch.from_numpy(random.integers(0, model.config.vocab_size, (1, count)))
        logits: np.ndarray = model(ids, cache)[0].float().numpy()
        return logits

    kept = [step(PROMPT)]
    start = time.perf_counter()
    kept += [step(1) for _ in range(STEPS)]
    figures: dict[str, Any] = {"tokens_per_s": STEPS / (time.perf_counter() - start)}
    if memory is not None:
        figures |= {"experts_held": model.pool.capacity, "read_gb": model.pool.reads.nbytes / 1e9}
    if together:
        seconds: dict[int, list[float]] = {count: [] for count in together}
        for _ in range(STEPS):
            for count in together:
                start = time.perf_counter()
                step(count)
                seconds[count].append(time.perf_counter() - start)
        figures["seconds"] = {str(count): statistics.median(times) for count, times in seconds.items()}
    if out is not None:
        np.save(out, np.concatenate(kept))
    return figures


@contextmanager
def slow_disk(file: Path) -> Iterator[list[str]]:
    """A prefix for commands whose reads of the disk of `file` are limited to SLOW_BYTES_PER_S."""
    folder = Path(f"/sys/fs/cgroup/blkio/moe-surgery-benchmark-{os.getpid()}")
    device = os.stat(file).st_dev
    try:
        folder.mkdir()
        limit = f"{os.major(device)}:{os.minor(device)} {SLOW_BYTES_PER_S}"
        (folder / "blkio.throttle.read_bps_device").write_text(limit)
    except OSError as error:
        raise click.ClickException(f"no cgroup that limits reads can be made here: {error}") from None
    try:
        yield enter_command(folder, [])
    finally:
        folder.rmdir()


class Runs:
    """Processes of `work`, and the logits of the one without a limit."""

    def __init__(self, checkpoint: Path, scratch: Path) -> None:
        self.checkpoint, self.scratch = checkpoint, scratch
        self.reference = scratch / "logits-mapped.npy"

    def start(
        self, out: Path, memory: int | None, together: tuple[int, ...] = (), prefix: tuple[str, ...] = ()
    ) -> subprocess.Popen[str]:
        command = [*prefix, sys.executable, "-m", "benchmarks.residency_checks", "--checkpoint"]
        command += [str(self.checkpoint), "--out", str(out)]
        command += [] if memory is None else ["--memory", str(memory)]
        command += [option for count in together for option in ("--together", str(count))]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def finish(self, process: subprocess.Popen[str], out: Path) -> dict[str, Any]:
        printed, _ = process.communicate()
        if process.returncode:
            raise click.ClickException(f"a run ended with {process.returncode}")
        found: dict[str, Any] = json.loads(printed.splitlines()[-1])
        if self.reference != out:
            if not self.reference.exists():
                self.finish(self.start(self.reference, None), self.reference)
            found["equal"] = np.array_equal(np.load(out), np.load(self.reference))
            out.unlink()
        return found

    def run(
        self, memory: int, together: tuple[int, ...] = (), prefix: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        out = self.scratch / "logits.npy"
        return {"limit_gb": memory / 1e9} | self.finish(self.start(out, memory, together, prefix), out)

    def part(self, name: str) -> list[dict[str, Any]]:
        if name == "equal":
            return [self.run(memory) for memory in LIMITS]
        if name == "two":
            outs = [self.scratch / f"logits-{i}.npy" for i in range(2)]
            pair = [(self.start(out, HALF), out) for out in outs]
            return [{"limit_gb": HALF / 1e9} | self.finish(*each) for each in pair]
        if name == "slow":
            with slow_disk(next(self.checkpoint.glob("*.safetensors"))) as prefix:
                return [self.run(SLOW_LIMIT, prefix=tuple(prefix))]
        return [self.run(DRAFT_LIMIT, TOGETHER)]


TITLES = {
    "equal": "Under limits, beside weights that are mapped without one",
    "two": "Two processes at once",
    "slow": f"Reads limited to {SLOW_BYTES_PER_S / 1e6:.0f} MB/s",
}


def page(report: dict[str, Any]) -> list[str]:
    lines = heading("The full-size model under limits on memory: bits, processes, disks, drafts", report)
    parts = report["parts"]
    for name, title in TITLES.items():
        if name in parts:
            rows = [
                (
                    f"{row['limit_gb']:.1f} GB",
                    f"{row['experts_held']} of 768",
                    "all bits" if row["equal"] else "NO",
                    f"{row['tokens_per_s']:.2f}",
                    f"{row['read_gb']:.1f}",
                )
                for row in parts[name]
            ]
            columns = ("limit", "experts held", "logits equal", "tokens/s", "GB read")
            lines += ["", f"## {title}", "", *table(columns, rows)]
    if "drafts" in parts:
        (row,) = parts["drafts"]
        one = row["seconds"]["1"]
        steps = [(count, f"{s:.3f}", f"{s / one:.2f}") for count, s in row["seconds"].items()]
        lines += ["", f"## Steps of several tokens, {row['limit_gb']:.0f} GB", ""]
        lines += table(("tokens in a step", "seconds, median", "to a step of one"), steps)
        lines += ["", "A draft pays where a step yields more tokens than the last column says."]
    return lines


@click.command(help=__doc__)
@click.option("--work", "scratch", type=click.Path(path_type=Path), help="Scratch folder.")
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True, help="Only these; others stay.")
@click.option("--checkpoint", type=click.Path(path_type=Path), hidden=True)
@click.option("--out", type=click.Path(path_type=Path), hidden=True)
@click.option("--memory", type=int, hidden=True)
@click.option("--together", type=int, multiple=True, hidden=True)
def main(
    scratch: Path | None,
    parts: tuple[str, ...],
    checkpoint: Path | None,
    out: Path | None,
    memory: int | None,
    together: tuple[int, ...],
) -> None:
    if checkpoint is not None:
        click.echo(json.dumps(work(checkpoint, out, memory, together)))
        return
    if scratch is None:
        raise click.UsageError("give --work")
    full = scratch / "full"
    if not full.exists():
        make_checkpoint(full, gpt_oss_20b(), 3)
    how = (
        f"python -m benchmarks.residency_checks: gpt-oss-20b's sizes, random weights and tokens; a prompt of {PROMPT} "
        f"tokens and {STEPS} single ones, whole processes."
    )
    earlier = load(NAME)
    report = begin(how, scratch) | {"parts": earlier["parts"] if earlier and parts else {}}
    runs = Runs(full, scratch)
    for name in parts or PARTS:
        report["parts"][name] = runs.part(name)
    runs.reference.unlink(missing_ok=True)
    publish(NAME, report, page(report))


if __name__ == "__main__":
    main()
