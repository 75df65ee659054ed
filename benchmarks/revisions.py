"""Whether commands became slower between two checkouts: each command of one and of the other in turn.

    git worktree add ../before REVISION && (cd ../before && python setup.py build_ext --inplace)
    python -m benchmarks.revisions ../before --work FOLDER [--rounds 7] [--renamed=--dtype=--store]

FOLDER needs 8 GB; a checkpoint of gpt-oss's shapes with three layers is written there. Whole processes,
bytecode cached, page cache warm; the order within a pair alternates. `--renamed OLD=NEW` gives an
option its former name in the other checkout. Decoding is timed inside the process (32 tokens after a
prompt of 64, model loaded). Results go to benchmarks/results/.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click

from benchmarks.layout import gpt_oss_20b
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.publish import begin, heading, publish, table

HERE = Path(__file__).resolve().parent.parent
TINY = str(HERE / "moe_surgery" / "examples" / "tiny-gpt-oss")
DECODE = """
import sys, time
from moe_surgery.runtime.load import load_model
from moe_surgery.runtime.generate import generate
model = load_model(sys.argv[1])
def seconds(new):
    start = time.perf_counter()
    generate(model, [list(range(1, 65))], max_new_tokens=new, stop_tokens=())
    return time.perf_counter() - start
seconds(4)
prompt = seconds(1)
print(seconds(33) - prompt)
"""
TEXTS = "A contract is an agreement between two parties that a court enforces.\n\ndef add(a, b):\n    return a + b\n"


def jobs(model: Path, work: Path) -> dict[str, list[str]]:
    """Command lines by name; OUT stands for the output, which is removed after each run."""
    tiny = TINY
    texts, plan, pruned, ranking = (
        str(work / n) for n in ("texts.txt", "plan.json", "pruned", "ranking.json")
    )
    quiet = "-q"
    return {
        "inspect": ["inspect", str(model)],
        "prune, keep 8": ["prune", str(model), "OUT", "--keep", "0-7", "--no-card", quiet],
        "prune, keep 4, to BF16": [
            "prune",
            str(model),
            "OUT",
            "--keep",
            "0-3",
            "--store",
            "bf16",
            "--no-card",
            quiet,
        ],
        "verify": ["verify", pruned, quiet],
        "export": ["export", str(model), "OUT", "--no-tokenizer", quiet],
        "profile, tiny": ["profile", tiny, "--texts", texts, "-o", "OUT", quiet],
        "search, tiny": ["search", tiny, "--texts", texts, "-o", "OUT", quiet],
        "evaluate, tiny": ["evaluate", tiny, "--plan", plan, "--texts", texts, "-o", "OUT", quiet],
        "plan": ["plan", ranking, "--experts", "8", "-o", "OUT", quiet],
    }


@dataclasses.dataclass(frozen=True)
class Sample:
    wall: float
    cpu: float
    rss_mib: float


def run(checkout: Path, arguments: list[str], out: Path) -> Sample:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = str(checkout)
    command = [sys.executable, "-m", "moe_surgery", *(str(out) if a == "OUT" else a for a in arguments)]
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, cwd=out.parent, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    message = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status:
        raise click.ClickException(f"{checkout}: {' '.join(command)}: {message.decode()[-400:]}")
    remove(out)
    return Sample(wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def decode(checkout: Path, model: Path, work: Path) -> float:
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(
        [sys.executable, "-c", DECODE, str(model)],
        env=environment, cwd=work, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return float(done.stdout)


def renamed(arguments: list[str], names: dict[str, str]) -> list[str]:
    former = {new: old for old, new in names.items()}
    return [former.get(a, a) for a in arguments]


@click.command(help=__doc__)
@click.argument("before", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Scratch folder.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--renamed", "renames", multiple=True, metavar="OLD=NEW", help="An option's former name.")
def main(before: Path, work: Path, rounds: int, renames: tuple[str, ...]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    before, work = before.resolve(), work.resolve()
    names = dict(pair.rsplit("=", 1) for pair in renames)
    model = work / "model"
    if not model.exists():
        make_checkpoint(model, dataclasses.replace(gpt_oss_20b(), layers=3, vocabulary=40000), 3)
    todo = jobs(model, work)
    (work / "texts.txt").write_text(TEXTS * 8)
    for made, arguments in (
        (
            work / "plan.json",
            ["plan", "--random", "--experts", "8", TINY, "-o", "OUT", "-q"],
        ),
        (work / "ranking.json", todo["search, tiny"]),
        (work / "pruned", todo["prune, keep 8"]),
    ):
        remove(made)
        command = [sys.executable, "-m", "moe_surgery", *(str(made) if a == "OUT" else a for a in arguments)]
        subprocess.run(command, check=True, capture_output=True)
    results = {
        name: pairs(before, arguments, work / "out", rounds, names) for name, arguments in todo.items()
    }
    steps: dict[str, list[float]] = {"before": [], "now": []}
    for number in range(rounds):
        for side in ("before", "now") if number % 2 else ("now", "before"):
            steps[side].append(decode(before if side == "before" else HERE, model, work))
    now, then = (statistics.median(steps[s]) for s in ("now", "before"))
    ratio = statistics.median(a / b for a, b in zip(steps["now"], steps["before"], strict=True))
    results["decode, 32 tokens"] = {"now_s": now, "before_s": then, "wall_ratio": ratio}
    revision = subprocess.run(
        ["git", "-C", str(before), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    how = f"python -m benchmarks.revisions CHECKOUT_OF_{revision} --work FOLDER --rounds {rounds}"
    how += "".join(f" --renamed={pair}" for pair in renames)
    report = {**begin(how, work), "before": revision, "rounds": rounds, "jobs": results}
    publish("revisions", report, page(report))


def pairs(
    before: Path, arguments: list[str], out: Path, rounds: int, names: dict[str, str]
) -> dict[str, float]:
    now: list[Sample] = []
    then: list[Sample] = []
    for number in range(-1, rounds):  # the first pair warms up
        for side in ("before", "now") if number % 2 else ("now", "before"):
            checkout, words = (HERE, arguments) if side == "now" else (before, renamed(arguments, names))
            sample = run(checkout, words, out)
            if number >= 0:
                (now if side == "now" else then).append(sample)
    both = list(zip(now, then, strict=True))
    return {
        "now_s": statistics.median(s.wall for s in now),
        "before_s": statistics.median(s.wall for s in then),
        "wall_ratio": statistics.median(a.wall / b.wall for a, b in both),
        "cpu_ratio": statistics.median(a.cpu / b.cpu for a, b in both),
        "now_rss_mib": max(s.rss_mib for s in now),
        "before_rss_mib": max(s.rss_mib for s in then),
    }


def page(report: dict) -> list[str]:
    rows = []
    for name, job in report["jobs"].items():
        cpu = f"{job['cpu_ratio']:.2f}" if "cpu_ratio" in job else "-"
        memory = f"{job['now_rss_mib']:.0f} / {job['before_rss_mib']:.0f}" if "now_rss_mib" in job else "-"
        times = (f"{job[key]:.3f} s" for key in ("now_s", "before_s"))
        rows.append((name, *times, f"{job['wall_ratio']:.2f}", cpu, memory))
    columns = ("command", "now", f"at {report['before']}", "wall, now / before", "CPU", "peak RSS MiB")
    lines = heading("Commands now and at an earlier revision", report)
    note = f"Medians of {report['rounds']} pairs. The checkpoint has 1.9 GB; tiny is the bundled one."
    return [*lines, "", note, "", *table(columns, rows)]


if __name__ == "__main__":
    main()
