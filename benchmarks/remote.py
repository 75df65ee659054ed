"""Pruning a full-size checkpoint that lies behind HTTP, beside curl fetching as many bytes from the same server.

    python -m benchmarks.remote --work FOLDER [--rounds 3] [--experts 8] [--link 'unlimited']

FOLDER needs some 30 GB. It holds, or is given, the full-size checkpoint of `surgery_budgets.py` (13.76 GB). A
hub on loopback (`hub_server.py`, sendfile) serves it: as fast as it can, and as links of 500 MB/s whose answers
take 5 ms and of 100 MB/s and 50 ms. Per link and round, alternating: curl fetches the bytes that prune needs in
six transfers at a time, to /dev/null; curl writes them to files on the disk of FOLDER, until `sync`; dd writes
as many zeros there, past the page cache, until they are flushed; `moe-surgery prune` writes the pruned
checkpoint there. The model is read once before, so that the server sends it from the page cache.
Ratios are of prune's bytes a second (all that the server sent) to those of the others in the same round: of the
slower of curl to /dev/null and dd, which is what server and disk allow, and of curl to files. Memory is the
whole process's peak resident set. Results go to benchmarks/results/; with --link those of other links that are there
already stay.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from benchmarks.hub_server import MODEL
from benchmarks.layout import gpt_oss_20b
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.publish import begin, heading, load, publish, span, table
from moe_surgery import inspect
from moe_surgery.bench.surgery import command_of, timed

MIB = 1 << 20
RSS_BUDGET_MIB = 64
TARGET = 0.9
TRANSFERS = 6
LINKS = {"unlimited": (0.0, 0.0), "500 MB/s, 5 ms": (500e6, 0.005), "100 MB/s, 50 ms": (100e6, 0.05)}


@contextmanager
def serving(source: Path, rate: float, latency: float) -> Iterator[str]:
    command = [sys.executable, "-m", "benchmarks.hub_server", str(source)]
    options = ["--rate", str(rate), "--latency", str(latency)]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


def read(folder: Path) -> None:
    """Bring the shards into the page cache."""
    with open(os.devnull, "wb") as nowhere:
        subprocess.run(["cat", *sorted(folder.glob("*.safetensors"))], stdout=nowhere, check=True)


def sent(url: str) -> int:
    with urllib.request.urlopen(f"{url}/sent") as answer:
        return int(answer.read())


def curl_command(url: str, source: Path, nbytes: int, target: Path | None) -> list[str]:
    """`nbytes` of the shards, in as many transfers; into files of the new folder `target`, or nowhere."""
    files = sorted(source.glob("*.safetensors"))
    share = nbytes // TRANSFERS
    command = ["curl", "--no-progress-meter", "--fail", "--parallel", "--parallel-immediate"]
    command += ["--parallel-max", str(TRANSFERS)]
    for number in range(TRANSFERS):
        first = number // len(files) * share
        out = "/dev/null" if target is None else str(target / str(number))
        address = f"{url}/{MODEL}/resolve/main/{files[number % len(files)].name}"
        separator = ["--next", "--no-progress-meter", "--fail"] if number else []
        command += [*separator, "--range", f"{first}-{first + share - 1}", "--output", out, address]
    return command


def curl_seconds(url: str, source: Path, nbytes: int, target: Path | None) -> float:
    if target is not None:
        target.mkdir()
    start = time.perf_counter()
    subprocess.run(curl_command(url, source, nbytes, target), check=True)
    if target is not None:
        os.sync()
        shutil.rmtree(target)
    return time.perf_counter() - start


def disk_seconds(nbytes: int, file: Path) -> float:
    """Writing `nbytes` zeros to the new file `file`, which is removed."""
    count = str(nbytes // (2 * MIB))
    start = time.perf_counter()
    options = ["bs=2M", f"count={count}", "oflag=direct", "conv=fsync", "status=none"]
    subprocess.run(["dd", "if=/dev/zero", f"of={file}", *options], check=True)
    seconds = time.perf_counter() - start
    file.unlink()
    return seconds


def measure(name: str, source: Path, work: Path, experts: int, rounds: int) -> dict[str, object]:
    rate, latency = LINKS[name]
    out = work / "out"
    rows = []
    with serving(source, rate, latency) as url:
        os.environ |= {"HF_ENDPOINT": url, "HF_HUB_CACHE": str(work / "cache"), "HF_HUB_OFFLINE": "0"}
        inspected = timed(command_of("inspect", MODEL, "--json"), work, cold=False)
        inspect_bytes = sent(url)
        kept_experts = ",".join(str(number * 32 // experts) for number in range(experts))
        prune = command_of("prune", MODEL, out, "--keep", kept_experts, "--quiet")
        for number in range(rounds):
            read(source)
            before = sent(url)
            pruned = timed(prune, work, cold=False)
            fetched = sent(url) - before
            kept = sum(f.stat().st_size for f in out.iterdir())
            shutil.rmtree(out)
            read(source)
            nowhere = curl_seconds(url, source, fetched, None)
            disk = disk_seconds(fetched, work / "zeros")
            to_disk = curl_seconds(url, source, fetched, work / "curl")
            rows.append(
                {
                    "prune_s": pruned.seconds,
                    "curl_s": nowhere,
                    "disk_s": disk,
                    "curl_to_disk_s": to_disk,
                    "fetched": fetched,
                    "written": kept,
                    "rss_mib": pruned.peak_bytes / MIB,
                }
            )
            click.echo(f"{name} {number}: " + ", ".join(f"{k} {v:.2f}" for k, v in rows[-1].items()))
    return {
        "fetched": rows[0]["fetched"],
        "written": rows[0]["written"],
        "prune_s": span([r["prune_s"] for r in rows]),
        "curl_s": span([r["curl_s"] for r in rows]),
        "disk_s": span([r["disk_s"] for r in rows]),
        "curl_to_disk_s": span([r["curl_to_disk_s"] for r in rows]),
        "rate_to_possible": statistics.median(max(r["curl_s"], r["disk_s"]) / r["prune_s"] for r in rows),
        "rate_to_curl_to_disk": statistics.median(r["curl_to_disk_s"] / r["prune_s"] for r in rows),
        "peak_rss_mib": max(r["rss_mib"] for r in rows),
        "inspect": {"bytes": inspect_bytes, "peak_rss_mib": inspected.peak_bytes / MIB},
    }


KEYS = ("prune_s", "curl_s", "disk_s", "curl_to_disk_s")


def page(report: dict) -> list[str]:
    columns = ("link", "fetched", "written", "prune", "curl", "dd", "curl to files")
    last = (f"rate to the slower of curl and dd ({TARGET})", "to curl to files")
    rows = []
    for name, link in report["links"].items():
        times = ["{:.1f}-{:.1f} s".format(*link[key]) for key in KEYS]
        sizes = [f"{link[key] / 1e9:.3f} GB" for key in ("fetched", "written")]
        ratios = [f"{link[key]:.2f}" for key in ("rate_to_possible", "rate_to_curl_to_disk")]
        rows.append((name, *sizes, *times, *ratios, f"{link['peak_rss_mib']:.1f}"))
    first = next(iter(report["links"].values()))["inspect"]
    return [
        *heading("Pruning from the hub", report),
        f"- the model: {report['model_bytes'] / 1e9:.2f} GB, of which {report['experts']} of 32 experts are kept",
        "",
        *table((*columns, *last, f"peak RSS MiB ({RSS_BUDGET_MIB})"), rows),
        "",
        f"`inspect` of the same model fetches {first['bytes'] / 1e3:.0f} kB "
        f"(peak RSS {first['peak_rss_mib']:.1f} MiB).",
    ]


@click.command(help=__doc__)
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="Scratch folder on the disk to measure."
)
@click.option("--rounds", default=3, show_default=True)
@click.option("--experts", default=8, show_default=True)
@click.option("--link", "links", multiple=True, type=click.Choice(list(LINKS)), default=list(LINKS))
def main(work: Path, rounds: int, experts: int, links: tuple[str, ...]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    source = work / "full"
    if not source.exists():
        make_checkpoint(source, gpt_oss_20b(), 3)
    report = {
        **begin(
            "python -m benchmarks.remote: `moe-surgery prune` of a model behind a hub on loopback (sendfile) and curl "
            "fetching as many bytes in six transfers alternate; server and clients share the machine.",
            work,
        ),
        "model_bytes": inspect(source).nbytes,
        "experts": experts,
        "links": {},
    }
    known = (load("remote") or {}).get("links", {})
    measured = {name: measure(name, source, work, experts, rounds) for name in links}
    report["links"] = {name: link for name in LINKS if (link := measured.get(name) or known.get(name))}
    publish("remote", report, page(report))


if __name__ == "__main__":
    main()
