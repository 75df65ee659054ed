"""What steps cost on the full-size checkpoint on this CPU: decoding by experts and batch, and speculation.

    python -m benchmarks.full_size_costs --work FOLDER

Runs `bench decode` and `bench speculate` on random weights of gpt-oss-20b's sizes (13.76 GB in FOLDER,
made where missing), the drafts views of 4, 8 and 16 random experts with a top-k of 1, 2 and 4, batch 1
and 8. Random weights show costs, not acceptance; what is said of acceptance is the break-even that
follows from the costs. Results go to benchmarks/results/; some twelve minutes on 2 cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import click

from benchmarks.layout import gpt_oss_20b
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.publish import begin, heading, publish, table

COSTS = ("plain_seconds", "target_seconds", "break_even", "most_speed_up")
EXPERTS, TOP_KS, BATCHES, LENGTHS = (4, 8, 16), (1, 2, 4), (1, 8), (1, 2, 4)


def tool(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "moe_surgery", *map(str, arguments)]


def ask(*arguments: object) -> dict:
    click.echo(f"{time.strftime('%H:%M:%S')} {' '.join(map(str, arguments))}")
    result: dict = json.loads(
        subprocess.run(tool(*arguments, "--json"), check=True, stdout=subprocess.PIPE).stdout
    )
    return result


def decode_row(row: dict) -> dict:
    """What the page shows of a row of `bench decode`."""
    return {
        **{key: row[key] for key in ("experts", "batch", "latency", "latency_p95", "bandwidth_share")},
        "tokens_per_second": row["decode_rate"]["median"],
        "bytes_per_step": row["bytes_per_token"] * row["batch"],
    }


def speculation_rows(target: Path, plans: list[Path], depth: int, rounds: int) -> list[dict]:
    """One row for each draft, top-k, batch and length."""
    drafts = [option for plan in plans for option in ("--draft-plan", plan)]
    rows = []
    for batch in BATCHES:
        for top_k in TOP_KS:
            settings = ("--draft-lengths", ",".join(map(str, LENGTHS)), "--batch", batch, "--depth", depth)
            result = ask(
                *("bench", "speculate", target, *drafts, "--draft-top-k", top_k),
                *(*settings, "--rounds", rounds),
            )
            rows += [
                {
                    "batch": batch,
                    "draft_experts": draft["experts"],
                    "draft_top_k": draft["top_k"],
                    "draft_weight_bytes": draft["weight_bytes"],
                    "target_cache_bytes": draft["target_cache_bytes"],
                    "draft_cache_bytes": draft["draft_cache_bytes"],
                    "length": cost["length"],
                    "draft_step_seconds": cost["draft_seconds"] / cost["length"],
                    **{key: cost[key] for key in COSTS},
                }
                for draft in result["drafts"]
                for cost in draft["lengths"]
            ]
    return rows


def page(report: dict) -> list[str]:
    lines = heading("Decoding and speculation on the full-size checkpoint, CPU", report)
    read = f"{report['read_bandwidth'] / 1e9:.1f} GB/s"
    lines += [
        "",
        f"Plain read loop before every run: {read} (median); shares are of the one just before.",
        "",
    ]
    columns = ["experts kept", "batch", "step, ms (median)", "p95", "tokens/s", "GB a step"]
    rows: list[tuple[object, ...]] = [
        (
            f"{row['experts']:g}",
            row["batch"],
            f"{row['latency'] * 1e3:.0f}",
            f"{row['latency_p95'] * 1e3:.0f}",
            f"{row['tokens_per_second']:.2f}",
            f"{row['bytes_per_step'] / 1e9:.2f}",
            f"{row['bandwidth_share']:.2f}",
        )
        for row in report["decode"]
    ]
    lines += table([*columns, "share of the read loop"], rows)
    lines += [
        "",
        "## Speculation, the draft a view",
        "",
        "Milliseconds, medians; a draft step over one token. Speed-up if every token were accepted.",
        "",
    ]
    columns = [
        "batch",
        "draft experts",
        "draft top-k",
        "drafted",
        "draft step",
        "plain step",
        "step that checks",
        "break-even acceptance",
        "speed-up at 1",
        "draft adds weights",
        "caches, target + draft",
    ]
    rows = []
    for row in report["speculation"]:
        even = "never" if row["break_even"] is None else f"{row['break_even']:.2f}"
        caches = " + ".join(f"{row[f'{side}_cache_bytes'] / 1e6:.1f}" for side in ("target", "draft"))
        steps = [f"{row[key] * 1e3:.0f}" for key in ("draft_step_seconds", "plain_seconds", "target_seconds")]
        rows.append(
            (
                row["batch"],
                f"{row['draft_experts']:g}",
                row["draft_top_k"],
                row["length"],
                *steps,
                even,
                f"{row['most_speed_up']:.2f}",
                f"{row['draft_weight_bytes'] / 1e6:.2f} MB",
                f"{caches} MB",
            )
        )
    return [*lines, *table(columns, rows)]


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Scratch folder.")
@click.option("--depth", default=32, show_default=True, help="Tokens before the steps.")
@click.option("--steps", default=8, show_default=True, help="Steps of decoding a round.")
@click.option("--rounds", default=5, show_default=True)
def main(work: Path, depth: int, steps: int, rounds: int) -> None:
    full, made = work / "full", work / "plans"
    if not full.exists():
        make_checkpoint(full, gpt_oss_20b(), 3)
    made.mkdir(parents=True, exist_ok=True)
    plans = [made / f"random-{kept}.json" for kept in EXPERTS]
    for kept, plan in zip(EXPERTS, plans, strict=True):
        plan.unlink(missing_ok=True)
        subprocess.run(tool("plan", "--random", "--experts", kept, full, "-o", plan, "-q"), check=True)
    kept_list = ",".join(map(str, EXPERTS))
    batches = ",".join(map(str, BATCHES))
    decode = ask(
        *("bench", "decode", full, "--expert-counts", kept_list, "--batches", batches, "--depth", depth),
        *("--steps", steps, "--rounds", rounds),
    )
    report = {
        **begin(
            f"python -m benchmarks.full_size_costs: context {depth}, {rounds} rounds, random weights (costs, not "
            "acceptance), views of random experts. Tokens are random and spread over experts more evenly than a "
            "text's.",
            work,
        ),
        "read_bandwidth": decode["read_bandwidth"],
        "decode": [decode_row(row) for row in decode["rows"]],
        "speculation": speculation_rows(full, plans, depth, rounds),
    }
    publish("full_size_costs", report, page(report))


if __name__ == "__main__":
    main()
