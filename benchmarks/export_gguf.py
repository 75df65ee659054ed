"""Peak memory and time of exporting a full-size checkpoint to GGUF, beside `cp` of as many bytes.

    python -m benchmarks.export_gguf --work FOLDER [--rounds 3]

FOLDER needs some 30 GB. It holds, or is given, the full-size checkpoint of `surgery_budgets.py`
(13.76 GB) and a synthetic tokenizer of gpt-oss's size. Jobs are all experts and eight of them, with BF16
and with Q8_0 matrices. Per job and round, alternating and each from a dropped page cache until its output
is flushed and then removed: `cp --reflink=never` and `sync` of the checkpoint's shards, and `moe-surgery
export`. An export that writes less is compared by bytes written a second. Dropping the page cache needs
root. Results go to benchmarks/results/.
"""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path

import click

from benchmarks.layout import gpt_oss_20b
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.make_tokenizer import make_tokenizer
from benchmarks.publish import begin, heading, publish, span, table
from benchmarks.surgery_budgets import MIB, timed
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
        "bytes": rows[0]["bytes"],
        "export_s": span([r["export_s"] for r in rows]),
        "cp_s": span([r["cp_s"] for r in rows]),
        "ratio_to_cp": statistics.median(r["ratio"] for r in rows),
        "peak_rss_mib": max(r["rss_mib"] for r in rows),
    }


def page(report: dict) -> list[str]:
    columns = ("experts", "bytes", "export", "cp + sync of 13.76 GB", "seconds a byte against cp, median")
    rows = []
    for name, job in report["jobs"].items():
        times = ["{:.1f}-{:.1f} s".format(*job[key]) for key in ("export_s", "cp_s")]
        figures = (f"{job['ratio_to_cp']:.2f}", f"{job['peak_rss_mib']:.1f}")
        rows.append((name, f"{job['bytes'] / 1e9:.2f} GB", *times, *figures))
    lines = heading("Export of a full-size checkpoint to GGUF", report)
    return [*lines, "", *table((*columns, f"peak RSS MiB ({RSS_BUDGET_MIB})"), rows)]


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
        make_checkpoint(source, gpt_oss_20b(), 3)
    if not (source / "tokenizer.json").exists():
        make_tokenizer(source, gpt_oss_20b().vocabulary)
    plan = work / "plan.json"
    timed(command_of("plan", "--random", "--experts", PRUNED_TO, source, "-o", plan, "-q"))
    report = {
        **begin(
            "python -m benchmarks.export_gguf: export and `cp --reflink=never` + sync alternate, each from a "
            "dropped page cache until flushed; whole process.",
            work,
        ),
        "jobs": {
            "32": measure(source, work, rounds, []),
            str(PRUNED_TO): measure(source, work, rounds, ["--plan", plan]),
            "32, --dense q8_0": measure(source, work, rounds, ["--dense", "q8_0"]),
            f"{PRUNED_TO}, --dense q8_0": measure(source, work, rounds, ["--plan", plan, "--dense", "q8_0"]),
        },
    }
    publish("export_gguf", report, page(report))


if __name__ == "__main__":
    main()
