"""gpt-oss-20b's shapes in less memory than its weights take: our two ways of running it, and llama.cpp.

    python -m benchmarks.residency --work FOLDER --limit 8 --routing even     # a round of one row, some minutes
    python -m benchmarks.residency --work FOLDER --publish                    # the page, of all rows so far

FOLDER holds, or is given, the full-size checkpoint of `surgery_budgets.py` (`full`) and its export with Q8_0
matrices (`full.gguf`): 26 GB. Per round, alternating and each from a dropped page cache, three processes in a
memory cgroup of the limit (GiB): experts from disk (`load_model(memory=...)`, the limit the same), weights mapped
(`load_model`), and llama.cpp, which maps its file. Each reads a prompt of random tokens and decodes random tokens,
so that routing is even; then counts. For uneven routing biases are added to the routers, in all three, until the
best 16 experts of every layer get 80 % of the routes; the 16 are passed as `residency`, as statistics would tell. The
bound is the rate at which the same disk reads random experts, measured in the same process before and after, over
the bytes of the experts that were not in memory. Needs root, for cgroups and to drop the page cache. Weights are
random: speed and memory, not quality.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np

from benchmarks.cgroup import enter_command, memory_cgroup
from benchmarks.layout import gpt_oss_20b
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.publish import begin, heading, publish, span, table
from benchmarks.residency_sides import SIDES
from moe_surgery.bench.surgery import command_of, drop_page_cache

ROUTING = ("even", "uneven")
ONE_SIDE = (sys.executable, "-m", "benchmarks.residency_sides")
MIB, GIB = 1 << 20, 1 << 30
GOAL_MAPPED, GOAL_LLAMA, GOAL_BOUND = 2.2, 3.0, 0.75


def run_side(
    side: str, file: Path, limit: int, threads: int, steps: int, seed: int, biases: Path | None
) -> dict:
    """What one side measured, and its memory as the cgroup charged it."""
    command = [*ONE_SIDE, side, file, "--threads", threads, "--steps", steps, "--seed", seed]
    if side == "resident":
        command += ["--memory", limit]
    if biases is not None and side != "llama.cpp":
        command += ["--biases", biases]
    if not drop_page_cache():
        raise click.ClickException("the page cache cannot be dropped; run as root")
    with memory_cgroup(limit) as group:
        if group is None:
            raise click.ClickException("no memory cgroup can be made here; run as root")
        folder, peak = group
        done = subprocess.run(enter_command(folder, list(map(str, command))), capture_output=True, text=True)
        if done.returncode:
            raise click.ClickException(f"{side}: exit {done.returncode}: {done.stderr.strip()[-800:]}")
        found: dict = json.loads(done.stdout.splitlines()[-1])
        found["peak_charged_mib"] = int(peak.read_text()) / MIB
        failed = folder / "memory.failcnt"
        found["times_at_limit"] = int(failed.read_text()) if failed.exists() else None
    return found


def measure(
    checkpoint: Path, gguf: Path, limit: int, threads: int, steps: int, biases: Path | None, number: int
) -> dict:
    """One round; sides begin in turn."""
    row = {}
    for side in SIDES[:: 1 if number % 2 == 0 else -1]:
        file = gguf if side == "llama.cpp" else checkpoint
        row[side] = run_side(side, file, limit * GIB, threads, steps, number, biases)
        click.echo(f"{limit} GiB, round {number}, {side}: {json.dumps(row[side])}")
    return row


def summary(rows: list[dict], limit: int, routing: str) -> dict:
    result: dict = {"limit": limit, "routing": routing, "rounds": len(rows)}
    for side in SIDES:
        result[side] = {
            key: statistics.median(row[side][key] for row in rows)
            for key, value in rows[0][side].items()
            if isinstance(value, (int, float))
        }
        result[side]["range"] = span([row[side]["tokens_per_s"] for row in rows])
        result[side]["peak_charged_mib"] = max(row[side]["peak_charged_mib"] for row in rows)
    result["resident"]["hit_rate_by_layer"] = [
        statistics.median(row["resident"]["hit_rate_by_layer"][i] for row in rows) for i in (0, 1)
    ]
    for other in SIDES[1:]:
        result[f"to {other}"] = statistics.median(
            row["resident"]["tokens_per_s"] / row[other]["tokens_per_s"] for row in rows
        )
    bounds = [row["resident"]["bound_tokens_per_s"] for row in rows]
    result["of bound"] = (
        None
        if None in bounds
        else statistics.median(
            row["resident"]["tokens_per_s"] / bound for row, bound in zip(rows, bounds, strict=True)
        )
    )
    return result


def calibrated(checkpoint: Path, gguf: Path, threads: int, work: Path) -> tuple[Path, Path]:
    """Router biases for uneven routing, and the export with them: its own bytes, changed in place."""
    biases = work / "biases.npz"
    if not biases.exists():
        command = [*ONE_SIDE, "calibrate", checkpoint, "--threads", threads, "--biases", biases]
        subprocess.run(list(map(str, command)), check=True)
    import gguf as ggml

    reader = ggml.GGUFReader(gguf, "r+")
    stored = np.load(biases)["bias"]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for layer, bias in enumerate(stored):
        rounded = (bias.astype(np.float32).view(np.uint32) + 0x8000 & 0xFFFF0000).view(np.float32)
        tensors[f"blk.{layer}.ffn_gate_inp.bias"].data[:] = rounded
    reader.data.flush()
    return biases, gguf


def page(report: dict) -> list[str]:
    lines = heading("Full-size model under limits on memory", report)
    lines += [
        "",
        f"Goals at 8 GiB with even routing: {GOAL_MAPPED} times mapped, {GOAL_LLAMA} times llama.cpp, "
        f"{GOAL_BOUND:.0%} of the bound.",
    ]
    for routing in ROUTING:
        rows = [row for row in report["rows"] if row["routing"] == routing]
        if not rows:
            continue
        lines += ["", f"## Routing: {routing}", ""]
        columns = ["limit", *(f"{side}, tokens/s" for side in SIDES), "to mapped", "to llama.cpp"]
        columns += ["bound, tokens/s", "of bound", "rounds"]
        lines += table(columns, [rates(row) for row in rows])
        lines += [""]
        columns = ["limit", "experts held", "hit rate", "by layer", "MB needed/token", "MB read/token"]
        columns += ["guesses right", "disk GB/s", "of disk", "share of best 16"]
        lines += table(columns, [reading(row) for row in rows])
        lines += [""]
        columns = ["limit", "side", "peak charged MiB", "anonymous MiB", "mapped files MiB", "times at limit"]
        lines += table(
            [*columns, "prompt tokens/s", "load s"], [cells for row in rows for cells in memory(row)]
        )
    return lines


def rates(row: dict) -> Sequence[object]:
    cells = ["{:.2f} ({:.2f}-{:.2f})".format(row[s]["tokens_per_s"], *row[s]["range"]) for s in SIDES]
    bound = row["resident"].get("bound_tokens_per_s")
    share = row["of bound"]
    return (
        f"{row['limit']} GiB",
        *cells,
        *(f"{row[f'to {side}']:.2f}" for side in SIDES[1:]),
        "" if bound is None else f"{bound:.2f}",
        "" if share is None else f"{share:.0%}",
        row["rounds"],
    )


def reading(row: dict) -> Sequence[object]:
    r = row["resident"]
    return (
        f"{row['limit']} GiB",
        f"{r['experts_held']:.0f} of 768",
        f"{r['hit_rate']:.0%}",
        "{:.0%}-{:.0%}".format(*r["hit_rate_by_layer"]),
        f"{r['needed_mb_per_token']:.0f}",
        f"{r['read_mb_per_token']:.0f}",
        f"{r['guess_precision']:.0%}",
        f"{r['disk_gb_per_s']:.2f}",
        f"{r['disk_share']:.0%}",
        f"{r['share_of_best']:.0%}",
    )


def memory(row: dict) -> list[Sequence[object]]:
    return [
        (
            f"{row['limit']} GiB",
            side,
            *(f"{row[side][k]:.0f}" for k in ("peak_charged_mib", "anonymous_mib", "mapped_mib")),
            f"{row[side]['times_at_limit'] or 0:.0f}",
            f"{row[side]['prompt_tokens_per_s']:.1f}",
            f"{row[side]['load_s']:.1f}",
        )
        for side in SIDES
    ]


@click.command(help=__doc__)
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="Scratch folder on the disk to measure."
)
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Default: FOLDER/full.")
@click.option("--limit", type=int, default=8, show_default=True, help="GiB.")
@click.option("--routing", type=click.Choice(ROUTING), default="even", show_default=True)
@click.option("--rounds", default=1, show_default=True, help="More rounds of this row.")
@click.option("--steps", default=16, show_default=True)
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--publish", "publishing", is_flag=True, help="Write the page instead of measuring.")
def main(
    work: Path,
    checkpoint: Path | None,
    limit: int,
    routing: str,
    rounds: int,
    steps: int,
    threads: int,
    publishing: bool,
) -> None:
    work.mkdir(parents=True, exist_ok=True)
    how = (
        "python -m benchmarks.residency: processes in a memory cgroup, one after the other, who begins alternates; "
        f"batch 1, {threads} threads, 48 + 8 tokens before those that count; random weights and tokens."
    )
    if publishing:
        rows = []
        for routing in ROUTING:
            files = work.glob(f"rounds-*-{routing}.json")
            for file in sorted(files, key=lambda file: int(file.stem.split("-")[1])):
                rows.append(summary(json.loads(file.read_text()), int(file.stem.split("-")[1]), routing))
        report = begin(how, work) | {"rows": rows}
        publish("residency", report, page(report))
        return
    source, gguf = checkpoint or work / "full", work / "full.gguf"
    if not source.exists():
        make_checkpoint(source, gpt_oss_20b(), 3)
    if not gguf.exists():
        subprocess.run(
            command_of("export", source, gguf, "--no-tokenizer", "--dense", "q8_0", "--quiet"), check=True
        )
    biases = None
    if routing == "uneven":
        biases, gguf = calibrated(source, gguf, threads, work)
    file = work / f"rounds-{limit}-{routing}.json"
    done = json.loads(file.read_text()) if file.exists() else []
    for number in range(len(done), len(done) + rounds):
        done.append(measure(source, gguf, limit, threads, steps, biases, number))
        file.write_text(json.dumps(done))


if __name__ == "__main__":
    main()
