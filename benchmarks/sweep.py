"""A sweep of the bundled model by two Ray workers, and its statistics by two, beside one process.

    python -m benchmarks.sweep --work FOLDER

FOLDER needs some 2 GB. Eight rankings of example:tiny (its five domains by weighted_ean, and all domains by three
metrics) are made from statistics of the demo's texts; `moe-surgery sweep` cuts it by each to 4 to 32 experts: 232
variants, first in one process, then in another folder by two Ray workers of which one is killed in between. Every
variant is then compared with the source, byte for byte. `du` counts what lies on the disk. Statistics are made by one
process, by two workers, and by two of which one is killed. A dry run says what the eight published rankings take for
gpt-oss-20b (a file of its shapes with holes). Needs Ray. Results go to benchmarks/results/.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.layout import gpt_oss_20b
from benchmarks.publish import begin, heading, publish, table
from moe_surgery import profile, rank, verify
from moe_surgery.demo import profile_texts
from moe_surgery.examples.skills import DOMAINS
from moe_surgery.selection.shipped import RANKINGS

TINY = "example:tiny"
BY_METRIC = ("weighted_ean", "reap", "frequency")
CONTEXT, BATCH = 256, 1024


def command_of(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "moe_surgery", *map(str, arguments)]


def rankings_in(work: Path) -> list[str]:
    """The options that name the eight rankings."""
    texts = {}
    for name, text in profile_texts().items():
        (work / f"{name}.txt").write_text(text)
        texts[name] = [work / f"{name}.txt"]
    statistics = profile(TINY, texts, work / "tiny.stats").statistics
    chosen: dict[str, Any] = {d: rank(statistics, BY_METRIC[0], domains=[d]) for d in DOMAINS}
    chosen |= {f"all-{metric}": rank(statistics, metric) for metric in BY_METRIC}
    options = []
    for name, ranking in chosen.items():
        (work / f"{name}.json").write_text(ranking.to_json())
        options += ["--ranking", str(work / f"{name}.json")]
    return options


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, from /proc."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


def kill_worker(process: subprocess.Popen[str], task: str) -> int:
    """Kill one process below `process` that does the Ray task `task`, a moment after it began; how many it were."""
    while process.poll() is None:
        for pid in descendants(process.pid):
            try:
                if not Path(f"/proc/{pid}/cmdline").read_bytes().startswith(f"ray::{task}".encode()):
                    continue
                time.sleep(0.1)
                os.kill(pid, signal.SIGKILL)
                return 1
            except (OSError, ProcessLookupError):
                continue
        time.sleep(0.02)
    return 0


def timed(command: list[str], victim: str | None = None) -> tuple[float, str, int]:
    """Seconds, what was printed, and how many workers (of the task `victim`) were killed on the way."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    killed = kill_worker(process, victim) if victim else 0
    out, err = process.communicate()
    seconds = time.perf_counter() - start
    if process.returncode:
        raise click.ClickException(err)
    return seconds, out, killed


def du(folder: Path, *options: str) -> int:
    """Bytes on the disk; hard links once, unless --count-links."""
    out = subprocess.run(["du", "-s", "-B1", *options, folder], capture_output=True, text=True, check=True)
    return int(out.stdout.split()[0])


def sweep_of(work: Path, rankings: list[str], *options: str, victim: str | None = None) -> dict[str, object]:
    out = work / "variants"
    shutil.rmtree(out, ignore_errors=True)
    command = command_of("sweep", TINY, out, *rankings, "--experts", "4-32", "--json", "-q", *options)
    seconds, printed, killed = timed(command, victim)
    result = json.loads(printed)
    again, printed, _ = timed(command)
    repeated = json.loads(printed)
    folders = [out / v["name"] for v in result["variants"]]
    dense = {(folder / "model-00001-of-00002.safetensors").stat().st_ino for folder in folders}
    return {
        "seconds": seconds,
        "workers_killed": killed,
        "variants": len(folders),
        "made": len(result["made"]),
        "verified": len(result["verified"]),
        "equal_to_source": sum(verify(folder, source=TINY).ok for folder in folders),
        "dense_files_on_disk": len(dense),
        "dense_bytes": (folders[0] / "model-00001-of-00002.safetensors").stat().st_size,
        "bytes_listed": sum(e["nbytes"] for e in result["index"]),
        "bytes_needed_beforehand": result["bytes_needed"],
        "du_bytes": du(out),
        "du_count_links_bytes": du(out, "--count-links"),
        "again_seconds": again,
        "again_made": len(repeated["made"]),
        "again_verified": len(repeated["verified"]),
    }


def statistics_of(work: Path, name: str, *options: str, victim: str | None = None) -> dict[str, object]:
    out = work / f"{name}.stats"
    out.unlink(missing_ok=True)
    texts = [o for d in DOMAINS for o in ("--texts", str(work / f"{d}.txt"))]
    limits = ["--context", str(CONTEXT), "--batch-tokens", str(BATCH)]
    seconds, printed, killed = timed(
        command_of("profile", TINY, *texts, *limits, "-o", out, "--json", "-q", *options), victim
    )
    tokens = sum(json.loads(printed)["tokens"].values())
    one = work / "one.stats"
    return {
        "seconds": seconds,
        "tokens": tokens,
        "batches": -(-tokens // BATCH),
        "workers_killed": killed,
        "same_bytes_as_one_process": out.read_bytes() == one.read_bytes(),
    }


def published(work: Path) -> dict[str, object]:
    """What all published variants of gpt-oss-20b take: a dry run on its shapes."""
    from tests.support.checkpoints import write_sparse_checkpoint

    folder = work / "gpt-oss-20b"
    if not folder.exists():
        write_sparse_checkpoint(folder, gpt_oss_20b())
    names = [o for name in RANKINGS for o in ("--ranking", f"published:{name}")]
    seconds, printed, _ = timed(
        command_of("sweep", folder, work / "published", *names, "--experts", "4-32", "--dry-run", "--json")
    )
    result = json.loads(printed)
    return {
        "seconds": seconds,
        "variants": len(result["variants"]),
        **{key: result[key] for key in ("bytes", "bytes_shared", "bytes_needed")},
    }


def page(report: dict[str, Any]) -> list[str]:
    rows: list[tuple[object, ...]]
    lines = heading("A sweep of 232 variants, and statistics by several workers", report)
    rows = []
    for name, s in report["sweeps"].items():
        rows.append(
            (
                name,
                f"{s['seconds']:.1f} s",
                s["workers_killed"],
                f"{s['made']} of {s['variants']}",
                s["verified"],
                s["equal_to_source"],
                f"{s['again_seconds']:.1f} s, {s['again_made']} made, {s['again_verified']} verified",
            )
        )
    columns = ["example:tiny, 8 rankings x 29 counts", "time", "workers killed", "made", "verified"]
    lines += ["", *table([*columns, "byte for byte as the source", "the same command again"], rows), ""]
    rows = []
    for name, s in report["sweeps"].items():
        sizes = (s[k] for k in ("bytes_listed", "dense_bytes", "bytes_needed_beforehand", "du_bytes"))
        shown = [f"{n / 1e6:.1f} MB" for n in (*sizes, s["du_count_links_bytes"])]
        rows.append((name, *shown, s["dense_files_on_disk"]))
    columns = [
        "on the disk",
        "sizes of all files",
        "dense file",
        "needed, said before",
        "du",
        "du --count-links",
    ]
    lines += [*table([*columns, "dense files on the disk"], rows), ""]
    rows = [
        (
            name,
            f"{s['seconds']:.1f} s",
            s["tokens"],
            s["batches"],
            s["workers_killed"],
            s["same_bytes_as_one_process"],
        )
        for name, s in report["statistics"].items()
    ]
    columns = ["statistics of example:tiny", "time", "tokens", "batches", "workers killed"]
    p = report["published"]
    if rows:
        lines += [*table([*columns, "file is that of one process, byte for byte"], rows), ""]
    return [
        *lines,
        f"All published variants of gpt-oss-20b are one command; its dry run ({p['seconds']:.1f} s) says:",
        f"{p['variants']} variants of {p['bytes'] / 1e9:.0f} GB together, of which {p['bytes_shared'] / 1e9:.0f} GB",
        f"are shared; to write: {p['bytes_needed'] / 1e9:.0f} GB.",
        "",
        "The time of a Ray run includes the start of Ray.",
    ]


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Scratch folder.")
@click.option("--part", type=click.Choice(["sweep", "ray", "statistics"]), multiple=True, help="Only these.")
def main(work: Path, part: tuple[str, ...]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    notes = work / "report.json"  # of parts that ran before
    report = json.loads(notes.read_text()) if part and notes.exists() else {"sweeps": {}, "statistics": {}}
    rankings = rankings_in(work)
    two = ("--ray", "--ray-workers", "2")

    def measured(kind: str, name: str, result: dict[str, object]) -> None:
        report[kind][name] = result
        notes.write_text(json.dumps(report))

    if not part or "sweep" in part:
        report["published"] = published(work)
        measured("sweeps", "one process", sweep_of(work, rankings))
    if not part or "ray" in part:
        measured("sweeps", "two Ray workers", sweep_of(work, rankings, *two))
        measured("sweeps", "two, one killed", sweep_of(work, rankings, *two, victim="make_variant"))
    if not part or "statistics" in part:
        measured("statistics", "one process", statistics_of(work, "one"))
        measured("statistics", "two Ray workers", statistics_of(work, "two", *two))
        killed = statistics_of(work, "killed", *two, victim="profile_part")
        measured("statistics", "two, one killed", killed)
    shutil.rmtree(work / "variants", ignore_errors=True)
    if {"published", "sweeps", "statistics"} <= report.keys() and len(report["sweeps"]) == 3 == len(
        report["statistics"]
    ):
        how = "python -m benchmarks.sweep: commands as a user types them, whole process."
        publish("sweep", {**begin(how, work), **report}, page({**begin(how, work), **report}))


if __name__ == "__main__":
    main()
