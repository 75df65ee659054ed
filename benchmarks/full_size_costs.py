"""What steps cost on the full-size checkpoint on this CPU: decoding by experts and batch, and speculation.

    python benchmarks/full_size_costs.py --work FOLDER

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
from machine import describe_machine
from make_checkpoint import Shape, make_checkpoint

RESULTS = Path(__file__).parent / "results"
EXPERTS, TOP_KS, BATCHES, LENGTHS = (4, 8, 16), (1, 2, 4), (1, 8), (1, 2, 4)


def tool(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "moe_surgery", *map(str, arguments)]


def ask(*arguments: object) -> dict:
    click.echo(f"{time.strftime('%H:%M:%S')} {' '.join(map(str, arguments))}")
    found: dict = json.loads(
        subprocess.run(tool(*arguments, "--json"), check=True, stdout=subprocess.PIPE).stdout
    )
    return found


def speculation_rows(target: Path, plans: list[Path], depth: int, rounds: int) -> list[dict]:
    """One row for each draft, top-k, batch and length."""
    drafts = [option for plan in plans for option in ("--draft-plan", plan)]
    rows = []
    for batch in BATCHES:
        for top_k in TOP_KS:
            settings = ("--draft-lengths", ",".join(map(str, LENGTHS)), "--batch", batch, "--depth", depth)
            found = ask(
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
                    **cost,
                    "draft_step_seconds": cost["draft_seconds"] / cost["length"],
                }
                for draft in found["drafts"]
                for cost in draft["lengths"]
            ]
    return rows


def as_markdown(report: dict) -> str:
    lines = ["# Decoding and speculation on the full-size checkpoint, CPU", "", report["how"], ""]
    lines += [f"- {name}: {value}" for name, value in report["machine"].items()]
    read = f"{report['read_bandwidth'] / 1e9:.1f} GB/s"
    lines += [
        "",
        f"Plain read loop before every run: {read} (median); shares are of the one just before.",
        "",
    ]
    lines += [
        "| experts kept | batch | step, ms (median) | p95 | tokens/s | GB a step | share of the read loop |"
    ]
    lines += ["|---" * 7 + "|"]
    for row in report["decode"]:
        lines.append(
            f"| {row['experts']:g} | {row['batch']} | {row['latency'] * 1e3:.0f} | {row['latency_p95'] * 1e3:.0f} "
            f"| {row['decode_rate']['median']:.2f} | {row['bytes_per_token'] * row['batch'] / 1e9:.2f} "
            f"| {row['bandwidth_share']:.2f} |"
        )
    lines += [
        "",
        "## Speculation, the draft a view",
        "",
        "Milliseconds, medians; a draft step over one token. Speed-up if every token were accepted.",
        "",
    ]
    names = (
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
    )
    lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in report["speculation"]:
        even = "never" if row["break_even"] is None else f"{row['break_even']:.2f}"
        caches = " + ".join(f"{row[f'{side}_cache_bytes'] / 1e6:.1f}" for side in ("target", "draft"))
        lines.append(
            f"| {row['batch']} | {row['draft_experts']:g} | {row['draft_top_k']} | {row['length']} "
            f"| {row['draft_step_seconds'] * 1e3:.0f} | {row['plain_seconds'] * 1e3:.0f} "
            f"| {row['target_seconds'] * 1e3:.0f} | {even} | {row['most_speed_up']:.2f} "
            f"| {row['draft_weight_bytes'] / 1e6:.2f} MB | {caches} MB |"
        )
    return "\n".join(lines) + "\n"


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Scratch folder.")
@click.option("--depth", default=32, show_default=True, help="Tokens before the steps.")
@click.option("--steps", default=8, show_default=True, help="Steps of decoding a round.")
@click.option("--rounds", default=5, show_default=True)
def main(work: Path, depth: int, steps: int, rounds: int) -> None:
    full, made = work / "full", work / "plans"
    if not full.exists():
        make_checkpoint(full, Shape(), 3)
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
        "how": f"python benchmarks/full_size_costs.py: depth {depth}, {rounds} rounds, random weights (costs, not "
        "acceptance), views of random experts. Tokens are random and spread over experts more evenly than a text's.",
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(work),
        "read_bandwidth": decode["read_bandwidth"],
        "settings": decode["settings"],
        "decode": [row | {"model": Path(row["model"]).name} for row in decode["rows"]],
        "speculation": speculation_rows(full, plans, depth, rounds),
    }
    (RESULTS / "full_size_costs.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "full_size_costs.md").write_text(as_markdown(report))
    click.echo(as_markdown(report))


if __name__ == "__main__":
    main()
