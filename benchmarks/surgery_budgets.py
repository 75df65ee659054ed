"""Peak memory and time of surgery on a full-size checkpoint, beside `cp` of the same bytes.

    python -m benchmarks.surgery_budgets --work FOLDER [--rounds 3] [--only mxfp4-4]

FOLDER needs some 45 GB. The checkpoint (13.76 GB, gpt-oss-20b's shapes, random weights) is made
there if it is not there yet. Per job and round, alternating: `moe-surgery prune` from a dropped page
cache, until its output is flushed; then `cp --reflink=never` of that output, from a dropped page
cache, until `sync`. Ratios are of the two in one round. Memory is the whole process's peak resident
set (`/usr/bin/time`), and for MXFP4 the job is run once more inside a memory cgroup of 128 MiB.
Dropping the page cache needs root. Results go to benchmarks/results/.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.cgroup import enter_command, memory_cgroup
from benchmarks.layout import gpt_oss_20b
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.publish import RESULTS, begin, heading, publish, span, table
from moe_surgery import inspect
from moe_surgery.bench import surgery as bench

CGROUP_BYTES = 128 << 20
MIB = 1 << 20


@dataclass(frozen=True)
class Job:
    name: str
    experts: int
    dtype: str
    rss_budget_mib: int
    time_budget: float


JOBS = (
    Job("mxfp4-4", 4, "keep", 64, 1.1),
    Job("mxfp4-8", 8, "keep", 64, 1.1),
    Job("mxfp4-31", 31, "keep", 64, 1.1),
    Job("bf16-4", 4, "bf16", 160, 1.15),
)


def timed(command: list[str], group: Path | None = None) -> tuple[float, int]:
    """Run from a dropped page cache; seconds and peak resident bytes of the whole process."""
    wrapped = command if group is None else enter_command(group, command)
    result = bench.timed(wrapped, RESULTS)
    return result.seconds, result.peak_bytes


def prune_command(source: Path, out: Path, job: Job, plan: Path) -> list[str]:
    return bench.command_of("prune", source, out, "--plan", plan, "--store", job.dtype, "--quiet")


def in_cgroup(source: Path, out: Path, job: Job, plan: Path) -> dict[str, object]:
    with memory_cgroup(CGROUP_BYTES) as group:
        if group is None:
            return {"skipped": "no memory cgroup can be made here"}
        folder, peak = group
        seconds, rss = timed(prune_command(source, out, job, plan), folder)
        return {
            "limit_mib": CGROUP_BYTES // MIB,
            "seconds": seconds,
            "peak_rss_mib": rss / MIB,
            "peak_charged_mib": int(peak.read_text()) / MIB,
        }


def measure(job: Job, source: Path, work: Path, rounds: int) -> dict[str, object]:
    out, target, plan = work / "out", work / "copy", work / "plan.json"
    timed(bench.command_of("plan", "--random", "--experts", job.experts, source, "-o", plan, "-q"))
    rows = []
    for number in range(rounds):
        shutil.rmtree(out, ignore_errors=True)
        seconds, rss = timed(prune_command(source, out, job, plan))
        copied = bench.copy_seconds(out, target).seconds
        rows.append({"prune_s": seconds, "cp_s": copied, "ratio": seconds / copied, "rss_mib": rss / MIB})
        click.echo(f"{job.name} round {number}: " + ", ".join(f"{k} {v:.2f}" for k, v in rows[-1].items()))
    nbytes = sum(f.stat().st_size for f in out.iterdir())
    verified, verify_rss = timed(bench.command_of("verify", out, "-q"))
    read = bench.read_seconds(out)
    click.echo(f"{job.name} verify: {verified:.2f} s, read once {read:.2f} s, rss {verify_rss / MIB:.1f}")
    shutil.rmtree(out)
    result: dict[str, object] = {
        "bytes": nbytes,
        "prune_s": span([r["prune_s"] for r in rows]),
        "cp_s": span([r["cp_s"] for r in rows]),
        "ratio_to_cp": statistics.median(r["ratio"] for r in rows),
        "time_budget": job.time_budget,
        "peak_rss_mib": max(r["rss_mib"] for r in rows),
        "rss_budget_mib": job.rss_budget_mib,
        "verify": {
            "seconds": verified,
            "read_once_seconds": read,
            "ratio": verified / read,
            "peak_rss_mib": verify_rss / MIB,
        },
    }
    if job.dtype == "keep":
        result["cgroup"] = in_cgroup(source, out, job, plan)
        click.echo(f"{job.name} cgroup: {result['cgroup']}")
        shutil.rmtree(out, ignore_errors=True)
    return result


def small_commands(source: Path, work: Path) -> dict[str, dict[str, float]]:
    model, ranking = inspect(source), work / "ranking.json"
    ranking.write_text(json.dumps({f"layer_{i}": list(range(model.experts)) for i in range(model.layers)}))
    chosen = ["--experts", 8, source, "-o", work / "plan.json"]
    jobs = {
        "inspect": bench.command_of("inspect", source, "--json"),
        "plan": bench.command_of("plan", ranking, *chosen),
        "plan --random": bench.command_of("plan", "--random", *chosen),
    }
    result = {}
    for name, command in jobs.items():
        runs = [timed(command) for _ in range(3)]
        result[name] = {
            "seconds_cold": statistics.median(s for s, _ in runs),
            "peak_rss_mib": max(r for _, r in runs) / MIB,
        }
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        result[name]["seconds_warm"] = time.perf_counter() - start
    return result


def page(report: dict) -> list[str]:
    lines = heading("Surgery on a full-size checkpoint", report)
    if report["generator_seconds"]:
        lines.append(f"- the checkpoint itself: 13.76 GB written in {report['generator_seconds']:.0f} s")
    jobs, commands = report["jobs"].items(), report["commands"].items()
    columns = ["job", "bytes", "prune", "cp + sync", "ratio, median (budget)", "peak RSS MiB (budget)"]
    rows: list[tuple[str, ...]] = []
    for name, job in jobs:
        times = ["{:.1f}-{:.1f} s".format(*job[key]) for key in ("prune_s", "cp_s")]
        group = job.get("cgroup", {})
        inside = f"{group['seconds']:.1f} s, done" if "seconds" in group else group.get("skipped", "")
        ratio = f"{job['ratio_to_cp']:.2f} ({job['time_budget']})"
        peak = f"{job['peak_rss_mib']:.1f} ({job['rss_budget_mib']})"
        rows.append((name, f"{job['bytes'] / 1e9:.2f} GB", *times, ratio, peak, inside))
    lines += ["", *table([*columns, "in 128 MiB cgroup"], rows), ""]
    columns = ["job", "verify", "reading once", "ratio (1.2)", "peak RSS MiB (64)"]
    rows = []
    for name, job in jobs:
        v = job["verify"]
        times = [f"{v[key]:.1f} s" for key in ("seconds", "read_once_seconds")]
        rows.append((name, *times, f"{v['ratio']:.2f}", f"{v['peak_rss_mib']:.1f}"))
    lines += [*table(columns, rows), ""]
    columns = ["command", "cold", "warm (0.5 s)", "peak RSS MiB (48)"]
    rows = [
        (name, f"{c['seconds_cold']:.2f} s", f"{c['seconds_warm']:.2f} s", f"{c['peak_rss_mib']:.1f}")
        for name, c in commands
    ]
    return [
        *lines,
        *table(columns, rows),
        "",
        "`cp` and `dd` read through the page cache, which may cost more than the reading once the cache grows; the",
        "engine reads past it where the kernel can (RWF_DONTCACHE, Linux 6.14).",
    ]


@click.command(help=__doc__)
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="Scratch folder on the disk to measure."
)
@click.option("--rounds", default=3, show_default=True)
@click.option("--only", multiple=True, type=click.Choice([j.name for j in JOBS]))
def main(work: Path, rounds: int, only: tuple[str, ...]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    if not bench.drop_page_cache():
        raise click.ClickException("the page cache cannot be dropped; run as root")
    source = work / "full"
    generated = None
    if not source.exists():
        start = time.perf_counter()
        make_checkpoint(source, gpt_oss_20b(), 3)
        generated = time.perf_counter() - start
    report = {
        **begin(
            "python -m benchmarks.surgery_budgets: prune and `cp --reflink=never` + sync alternate, each "
            "from a dropped page cache until flushed; whole process, /usr/bin/time.",
            work,
        ),
        "generator_seconds": generated,
        "commands": small_commands(source, work),
        "jobs": {j.name: measure(j, source, work, rounds) for j in JOBS if not only or j.name in only},
    }
    name = "surgery_budgets" if not only else f"surgery_budgets-{'-'.join(only)}"
    publish(name, report, page(report))


if __name__ == "__main__":
    main()
