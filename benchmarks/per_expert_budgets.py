"""Peak memory and time of surgery on checkpoints that store each expert separately, beside `cp` of the same bytes.

    python -m benchmarks.per_expert_budgets --work FOLDER [--rounds 3]

FOLDER needs some 45 GB. Two checkpoints are made there (`make_per_expert.py`) if they are not there yet: Qwen3-MoE's
layout with 128 experts in 48 layers in BF16 (20 GB, 18,672 tensors, 8 shards), and one with 98,000 tensors whose
files are holes, for memory. Prune and `cp --reflink=never` + sync alternate, each from a dropped page cache until
flushed, as in `surgery_budgets.py`. Dropping the page cache needs root. Results go to benchmarks/results/.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from benchmarks.make_per_expert import make_checkpoint
from benchmarks.publish import begin, heading, publish, table
from benchmarks.surgery_budgets import MIB, Job, measure, timed
from moe_surgery.bench.surgery import command_of, drop_page_cache

JOBS = (Job("128 to 64", 64, "keep", 64, 1.1), Job("128 to 16", 16, "keep", 64, 1.1))
MANY_TENSORS_BUDGET_MIB = 150


def many_tensors(work: Path) -> dict[str, object]:
    """Memory on 98,000 tensors: inspect, prune to half (holes are written as zeros), verify."""
    source, out = work / "many", work / "many-out"
    count = 98_000
    if not source.exists():
        count, _ = make_checkpoint(
            source, layers=64, experts=256, hidden=128, intermediate=128, fmt="fp8", sparse=True
        )
    shutil.rmtree(out, ignore_errors=True)
    peaks = {}
    for name, command in (
        ("inspect", command_of("inspect", source, "--json")),
        ("prune", command_of("prune", source, out, "--keep", "0-127", "--quiet")),
        ("verify", command_of("verify", out, "--source", source, "--quiet")),
    ):
        seconds, rss = timed(command)
        peaks[name] = {"seconds": seconds, "peak_rss_mib": rss / MIB}
        click.echo(f"{count:,} tensors, {name}: {seconds:.1f} s, {rss / MIB:.1f} MiB")
    shutil.rmtree(out)
    return {"tensors": count, "commands": peaks}


def page(report: dict) -> list[str]:
    lines = heading("Surgery on checkpoints that store each expert separately", report)
    rows = []
    for name, job in report["jobs"].items():
        times = ["{:.1f}-{:.1f} s".format(*job[key]) for key in ("prune_s", "cp_s")]
        ratio = f"{job['ratio_to_cp']:.2f} ({job['time_budget']})"
        peak = f"{job['peak_rss_mib']:.1f} ({job['rss_budget_mib']})"
        inside = job["cgroup"].get("skipped") or f"{job['cgroup']['seconds']:.1f} s, done"
        verify = f"{job['verify']['ratio']:.2f}, {job['verify']['peak_rss_mib']:.1f} MiB"
        rows.append((name, f"{job['bytes'] / 1e9:.2f} GB", *times, ratio, peak, inside, verify))
    columns = ("experts", "bytes", "prune", "cp + sync", "ratio, median (budget)", "peak RSS MiB (budget)")
    lines += ["", *table((*columns, "in 128 MiB cgroup", "verify against reading once"), rows), ""]
    many = report["many"]
    names = (f"{many['tensors']:,} tensors", "seconds", f"peak RSS MiB ({MANY_TENSORS_BUDGET_MIB})")
    peaks = [(n, f"{c['seconds']:.1f}", f"{c['peak_rss_mib']:.1f}") for n, c in many["commands"].items()]
    return [*lines, *table(names, peaks)]


@click.command(help=__doc__)
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="Scratch folder on the disk to measure."
)
@click.option("--rounds", default=3, show_default=True)
def main(work: Path, rounds: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    if not drop_page_cache():
        raise click.ClickException("the page cache cannot be dropped; run as root")
    source = work / "per-expert"
    if not source.exists():
        make_checkpoint(source, layers=48, experts=128, hidden=2048, intermediate=256)
    report = {
        **begin("python -m benchmarks.per_expert_budgets --work FOLDER; whole process, /usr/bin/time.", work),
        "jobs": {job.name: measure(job, source, work, rounds) for job in JOBS},
        "many": many_tensors(work),
    }
    publish("per_expert_budgets", report, page(report))


if __name__ == "__main__":
    main()
