"""Time and memory of prune, compared with `cp` of the same bytes, verify and inspect.

Every command runs in a separate process, as a user runs it. Does not need torch.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moe_surgery.bench.rounds import check_numbers
from moe_surgery.errors import DiskFullError, OutputError, UsageError

__all__ = [
    "Measured",
    "SurgeryRun",
    "command_of",
    "copy_seconds",
    "drop_page_cache",
    "measure_surgery",
    "read_seconds",
    "surgery_figures",
    "timed",
]

MIB = 1 << 20
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
# A forked process inherits its parent's peak memory, so a small launcher forks the command.
LAUNCHER = """
import os, resource, sys
child = os.fork()
if child == 0:
    os.execvp(sys.argv[2], sys.argv[2:])
_, status, used = os.wait4(child, 0)
peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
with open(sys.argv[1], "w") as file:
    file.write(str(peak))
sys.exit(os.waitstatus_to_exitcode(status) & 255)
"""


@dataclass(frozen=True, slots=True)
class Measured:
    """One command: seconds and the peak of resident bytes of the whole process."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class SurgeryRun:
    """One round for one number of experts. `inspect` reads the source's headers; `output_bytes` were
    written by prune and copied by cp."""

    experts: int
    store: str
    number: int
    output_bytes: int
    inspect: Measured
    prune: Measured
    copy: Measured
    verify: Measured
    read_seconds: float


def drop_page_cache() -> bool:
    """Flush and drop cached files, so that the next read is from disk; False if not permitted."""
    os.sync()
    try:
        DROP_CACHES.write_text("3")
    except OSError:
        return False
    return True


def command_of(*arguments: object) -> list[str]:
    """`moe-surgery ARGUMENTS` in this Python."""
    return [sys.executable, "-m", "moe_surgery", *map(str, arguments)]


def timed(command: Sequence[str], folder: Path, *, cold: bool = True) -> Measured:
    """Run `command` to its end; `folder` takes a small temporary file.

    `cold` drops the page cache first, if permitted. Raises OutputError if the command fails.
    """
    if cold:
        drop_page_cache()
    report = folder / f".peak-{os.getpid()}"
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", LAUNCHER, str(report), *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,  # so that all of it can be killed
    )
    try:
        _, stderr = process.communicate()
        seconds = time.perf_counter() - start
        if process.returncode:
            raise OutputError(f"{' '.join(command)}: exit {process.returncode}: {stderr.strip()[-500:]}")
        return Measured(seconds, int(report.read_text()))
    except BaseException:
        _end(process)
        raise
    finally:
        report.unlink(missing_ok=True)


def _end(process: subprocess.Popen[str]) -> None:
    """Kill a process and what it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def copy_seconds(out: Path, target: Path, *, cold: bool = True) -> Measured:
    """`cp` of the files of `out` into the new folder `target` and `sync`; `target` is removed afterwards."""
    target.mkdir()
    files = [str(f) for f in sorted(out.iterdir())]
    share = ["--reflink=never"] if sys.platform == "linux" else []
    script = 'target=$1; shift; cp "$@" "$target" && sync'
    try:
        return timed(["sh", "-c", script, "sh", str(target), *share, *files], out.parent, cold=cold)
    finally:
        _remove(target)


def read_seconds(out: Path, *, cold: bool = True) -> float:
    """Reading the files of `out` once, in requests of 4 MiB."""
    if cold:
        drop_page_cache()
    buffer = bytearray(4 * MIB)
    start = time.perf_counter()
    for file in sorted(out.iterdir()):
        with file.open("rb", buffering=0) as source:
            while source.readinto(buffer):
                pass
    return time.perf_counter() - start


def measure_surgery(
    checkpoint: str,
    work: Path,
    *,
    expert_counts: Sequence[int],
    store: str = "keep",
    rounds: int = 3,
    cold: bool = True,
) -> Iterator[SurgeryRun]:
    """Prune `checkpoint` to each number of `expert_counts` (random experts), `rounds` times, in alternation.

    Outputs go to a new folder in `work` that is always removed at the end. Raises UsageError for numbers
    out of range, OutputError if a command fails, DiskFullError if outputs do not fit.
    """
    check_numbers(expert_counts=expert_counts, rounds=[rounds])
    if not work.is_dir():
        raise UsageError(f"`work` {work}: is not a folder; name one with space for the outputs")
    folder = work / f"moe-surgery-bench-{os.getpid()}"
    folder.mkdir()
    try:
        out, plan = folder / "out", folder / "plan.json"
        for number in range(rounds):
            for turn in range(len(expert_counts)):
                count = expert_counts[(turn + number) % len(expert_counts)]
                chosen = ("--random", "--experts", count, checkpoint, "-o", plan, "-q")
                timed(command_of("plan", *chosen), folder, cold=False)
                yield _run_round(checkpoint, folder, out, plan, count, store, number, cold)
                shutil.rmtree(out)
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove `folder`, into which a process that was just killed may still be writing."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)
    shutil.rmtree(folder)


def _run_round(
    checkpoint: str, folder: Path, out: Path, plan: Path, count: int, store: str, number: int, cold: bool
) -> SurgeryRun:
    inspected = timed(command_of("inspect", checkpoint, "--json"), folder, cold=cold)
    prune = command_of("prune", checkpoint, out, "--plan", plan, "--store", store, "-q")
    pruned = timed(prune, folder, cold=cold)
    nbytes = sum(f.stat().st_size for f in out.iterdir())
    if shutil.disk_usage(folder).free < nbytes:
        raise DiskFullError(
            f"{folder}: no space for a copy of {nbytes / 1e9:.2f} GB; choose another folder for `work`"
        )
    copied = copy_seconds(out, folder / "copy", cold=cold)
    verified = timed(command_of("verify", out, "-q"), folder, cold=cold)
    read = read_seconds(out, cold=cold)
    return SurgeryRun(count, store, number, nbytes, inspected, pruned, copied, verified, read)


def surgery_figures(runs: Sequence[SurgeryRun]) -> list[dict[str, object]]:
    """A row per number of experts: medians of seconds and of ratios within a round, peaks over all."""
    rows: list[dict[str, object]] = []
    for count in sorted({r.experts for r in runs}):
        group = [r for r in runs if r.experts == count]

        def median(values: Iterator[float]) -> float:
            return statistics.median(values)

        rows.append(
            {
                "experts": count,
                "store": group[0].store,
                "rounds": len(group),
                "output_bytes": group[0].output_bytes,
                "inspect_seconds": median(r.inspect.seconds for r in group),
                "inspect_peak_bytes": max(r.inspect.peak_bytes for r in group),
                "prune_seconds": median(r.prune.seconds for r in group),
                "copy_seconds": median(r.copy.seconds for r in group),
                "ratio_to_copy": median(r.prune.seconds / r.copy.seconds for r in group),
                "prune_peak_bytes": max(r.prune.peak_bytes for r in group),
                "verify_seconds": median(r.verify.seconds for r in group),
                "read_seconds": median(r.read_seconds for r in group),
                "ratio_to_read": median(r.verify.seconds / r.read_seconds for r in group),
                "verify_peak_bytes": max(r.verify.peak_bytes for r in group),
            }
        )
    return rows
