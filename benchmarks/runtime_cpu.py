"""The runtime on a full-size checkpoint and on one pruned to 4 experts, on the CPU.

    python -m benchmarks.runtime_cpu --work FOLDER [--context 1024]

FOLDER holds, or is given, the full-size checkpoint of `surgery_budgets.py` (13.76 GB) and its pruned
copy (4.87 GB). Each model runs in a separate process: load, prefill to fill the context but for 32
tokens, decode those 32. The pruned one runs again inside a memory cgroup of 6 GiB. Figures are
of random weights: speed and memory, not quality. Results go to benchmarks/results/.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import click

from benchmarks.cgroup import enter_command, memory_cgroup
from benchmarks.layout import gpt_oss_20b
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.publish import begin, heading, publish, table

CGROUP_BYTES = 6 << 30
NEW_TOKENS = 32


def status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def run_model(path: str, context: int) -> dict[str, float]:
    """Load, prefill and decode in this process."""
    import torch

    from moe_surgery.runtime.load import load_model

    start = time.perf_counter()
    model = load_model(path)
    loaded = time.perf_counter()
    cache = model.new_cache(1, context)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.config.vocab_size, (1, context - NEW_TOKENS), generator=generator)
    logits = model(prompt, cache, logits_to_keep=1)
    prefilled = time.perf_counter()
    for _ in range(NEW_TOKENS):
        logits = model(logits[:, -1:].argmax(-1), cache)
    decoded = time.perf_counter()
    assert torch.isfinite(logits).all()
    return {
        "load_s": loaded - start,
        "prefill_tokens_per_s": prompt.shape[1] / (prefilled - loaded),
        "decode_tokens_per_s": NEW_TOKENS / (decoded - prefilled),
        "rss_anon_mib": status_mib("RssAnon"),
        "rss_file_mib": status_mib("RssFile"),
        "peak_rss_mib": status_mib("VmHWM"),
        "cache_mib": cache.nbytes / (1 << 20),
    }


def in_process(path: Path, context: int, group: Path | None = None) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.runtime_cpu", "--one", str(path), "--context", str(context)]
    done = subprocess.run(enter_command(group, command) if group else command, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{path}: exit {done.returncode}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


def measure(work: Path, context: int) -> dict[str, dict]:
    full, pruned = work / "full", work / "pruned-4"
    if not full.exists():
        make_checkpoint(full, gpt_oss_20b(), 3)
    if not pruned.exists():
        subprocess.run(
            [sys.executable, "-m", "moe_surgery", "prune", full, pruned, "--keep", "0-3", "-q"], check=True
        )
    runs = {"32 experts": in_process(full, context), "4 experts": in_process(pruned, context)}
    with memory_cgroup(CGROUP_BYTES) as group:
        if group is not None:
            runs["4 experts, 6 GiB cgroup"] = in_process(pruned, context, group[0])
            runs["4 experts, 6 GiB cgroup"]["charged_peak_mib"] = int(group[1].read_text()) / (1 << 20)
    return runs


def page(report: dict) -> list[str]:
    keys = list(next(iter(report["runs"].values())))
    rows = [(name, *(f"{run[key]:.2f}" for key in keys)) for name, run in report["runs"].items()]
    return [*heading("The runtime on the CPU, full size", report), "", *table(("model", *keys), rows)]


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path))
@click.option("--context", default=1024, show_default=True)
@click.option("--one", hidden=True)
def main(work: Path | None, context: int, one: str | None) -> None:
    if one:
        click.echo(json.dumps(run_model(one, context)))
        return
    if work is None:
        raise click.UsageError("--work FOLDER is missing")
    report = {
        **begin(
            f"python -m benchmarks.runtime_cpu: default backend and dtype, batch 1, context {context} filled.",
            work,
        ),
        "runs": measure(work, context),
    }
    publish("runtime_cpu", report, page(report))


if __name__ == "__main__":
    main()
