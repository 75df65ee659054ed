"""Peak memory and time of exporting a full-size checkpoint to GGUF, beside `cp` of as many bytes.

    python benchmarks/export_gguf.py --work FOLDER [--rounds 3]

FOLDER needs some 30 GB. It holds, or is given, the full-size checkpoint of `surgery_budgets.py`
(13.76 GB) and a synthetic tokenizer of gpt-oss's size. Per job and round, alternating and each from a
dropped page cache until its output is flushed and then removed: `cp --reflink=never` and `sync` of the
checkpoint's shards, and `moe-surgery export`. A pruned export is compared by bytes a second. Dropping
the page cache needs root. Results go to benchmarks/results/.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from pathlib import Path

import click
from machine import describe_machine
from make_checkpoint import Shape, make_checkpoint
from make_tokenizer import make_tokenizer
from surgery_budgets import MIB, RESULTS, timed

from moe_surgery.bench.surgery import command_of, drop_page_cache

RSS_BUDGET_MIB = 192
PRUNED_TO = 8


def copy_seconds(source: Path, target: Path) -> float:
    target.mkdir()
    files = " ".join(f"'{f}'" for f in sorted(source.glob("*.safetensors")))
    seconds, _ = timed(["sh", "-c", f"cp -L --reflink=never {files} '{target}' && sync"])
    shutil.rmtree(target)
    return seconds


def measure(source: Path, work: Path, rounds: int, options: list[object]) -> dict[str, object]:
    out = work / "out.gguf"
    source_bytes = sum(f.stat().st_size for f in source.glob("*.safetensors"))
    rows = []
    for number in range(rounds):
        copied = copy_seconds(source, work / "copy")
        seconds, rss = timed(command_of("export", source, out, "--quiet", *options))
        nbytes = out.stat().st_size
        out.unlink()
        rows.append(
            {
                "export_s": seconds,
                "cp_s": copied,
                "bytes": nbytes,
                "ratio": seconds / nbytes / (copied / source_bytes),
                "rss_mib": rss / MIB,
            }
        )
        click.echo(f"round {number}: " + ", ".join(f"{k} {v:.2f}" for k, v in rows[-1].items()))
    return {
        "rounds": rows,
        "ratio_to_cp": statistics.median(r["ratio"] for r in rows),
        "peak_rss_mib": max(r["rss_mib"] for r in rows),
    }


def as_markdown(report: dict) -> str:
    lines = ["# Export of a full-size checkpoint to GGUF", "", str(report["how"]), ""]
    lines += [f"- {name}: {value}" for name, value in report["machine"].items()]
    lines += [
        "",
        f"| experts | bytes | export | cp + sync of 13.76 GB | seconds a byte against cp, median | "
        f"peak RSS MiB ({RSS_BUDGET_MIB}) |",
        "|---|---|---|---|---|---|",
    ]
    for name, job in report["jobs"].items():
        spans = [
            f"{min(r[key] for r in job['rounds']):.1f}-{max(r[key] for r in job['rounds']):.1f} s"
            for key in ("export_s", "cp_s")
        ]
        lines.append(
            f"| {name} | {job['rounds'][0]['bytes'] / 1e9:.2f} GB | {spans[0]} | {spans[1]} "
            f"| {job['ratio_to_cp']:.2f} | {job['peak_rss_mib']:.1f} |"
        )
    return "\n".join(lines) + "\n"


@click.command(help=__doc__)
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="Scratch folder on the disk to measure."
)
@click.option("--rounds", default=3, show_default=True)
def main(work: Path, rounds: int) -> None:
    if not drop_page_cache():
        raise click.ClickException("the page cache cannot be dropped; run as root")
    source = work / "full"
    if not source.exists():
        make_checkpoint(source, Shape(), 3)
    if not (source / "tokenizer.json").exists():
        make_tokenizer(source, Shape().vocabulary)
    plan = work / "plan.json"
    timed(command_of("plan", "--random", "--experts", PRUNED_TO, source, "-o", plan, "-q"))
    report = {
        "how": "python benchmarks/export_gguf.py: export and `cp --reflink=never` + sync alternate, each from a "
        "dropped page cache until flushed; whole process.",
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(work),
        "jobs": {
            "32": measure(source, work, rounds, []),
            str(PRUNED_TO): measure(source, work, rounds, ["--plan", plan]),
        },
    }
    (RESULTS / "export_gguf.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "export_gguf.md").write_text(as_markdown(report))
    click.echo(as_markdown(report))


if __name__ == "__main__":
    main()
