"""llama.cpp and our runtime on the CPU, alternately in one run, on the same weights with the same threads.

    python -m benchmarks.beside_llama_cpp --work FOLDER [--experts 4 --experts 8 --experts 32] [--rounds 3]
    python -m benchmarks.beside_llama_cpp --work FOLDER --tiny          # the script itself, in a minute

Needs llama-cpp-python, and 30 GB in FOLDER for the full-size model. FOLDER holds, or is given, the
full-size checkpoint of `surgery_budgets.py`; per expert count it is pruned and exported to GGUF, so both
sides have the same weights. Each side is a process: it loads, warms up, decodes at batch 1 and 8 from a
short prompt, and reads a prompt of 512 tokens; the files they map are read into the page cache before.
Where memory holds both they take turns every four steps, else one process follows the other; who begins
changes. Beside them, in every round, a plain loop reads memory with as many threads. A rate is the median
over turns; ratios are of the two in one round, ours to llama.cpp's; medians over rounds. Weights are
random: speed and memory, not quality. Routers of random weights have near ties that any rounding decides,
so the logits of the two are compared with a control, ours in BF16 beside ours in float32; no ratio is given
where they agree much less than that. Results go to benchmarks/results/.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import click
import numpy as np

from benchmarks.decode_sides import BATCHES, CONTEXT, MEMORY, PREFILL, PROMPT, SIDES
from benchmarks.layout import gpt_oss_20b
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.publish import RESULTS, begin, heading, publish, span, table
from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.resolve import resolve
from moe_surgery.families import identify_model
from moe_surgery.families.model_config import ModelConfig
from moe_surgery.runtime.decode_cost import bytes_per_token

ONE_SIDE = (sys.executable, "-m", "benchmarks.decode_sides")
WARM_UP = 3
TURN = 4  # steps between one side's turn and the other's
REPACKED = 0.8
"""Of its file, what llama.cpp holds a second time: its experts in another order."""
AGREEMENT = 0.8
"""Least cosine of the two sides' logits, as a share of the control's."""
GOALS = {"batch 1": 1.0, "batch 8": 1.0, "prefill": 0.5}
MIB = 1 << 20


def child(*arguments: object) -> dict:
    command = [*ONE_SIDE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(
            f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()[-800:]}"
        )
    result: dict = json.loads(done.stdout.splitlines()[-1])
    return result


def warm(path: Path) -> None:
    """Read the files of a model once, so that they are in the page cache as far as it has room."""
    buffer = bytearray(4 * MIB)
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def make_model(source: Path, experts: int, work: Path) -> tuple[Path, Path, Callable[[], None]]:
    """A checkpoint of `experts` experts, its export, and what removes what was made."""
    with Checkpoint.open(source) as opened:
        whole = identify_model(opened).experts == experts
    pruned, gguf = work / f"pruned-{experts}", work / f"model-{experts}.gguf"

    def remove() -> None:
        gguf.unlink(missing_ok=True)
        shutil.rmtree(pruned, ignore_errors=True)

    remove()
    tool = [sys.executable, "-m", "moe_surgery"]
    if not whole:
        subprocess.run([*tool, "prune", source, pruned, "--keep", f"0-{experts - 1}", "-q"], check=True)
    checkpoint = source if whole else pruned
    # Token numbers are all that is measured: a tokenizer would change nothing.
    subprocess.run([*tool, "export", checkpoint, gguf, "--no-tokenizer", "-q"], check=True)
    return checkpoint, gguf, remove


class Side:
    """A side's process, and what it has been measured to do."""

    def __init__(self, name: str, checkpoint: Path, gguf: Path, threads: int, logits: Path) -> None:
        warm(checkpoint if name == "ours" else gguf)
        arguments = (name, checkpoint, gguf, "--threads", threads, "--logits", logits)
        self._process = subprocess.Popen(
            [*ONE_SIDE, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.found: dict = self._answer()

    def _answer(self) -> dict:
        assert self._process.stdout
        while (line := self._process.stdout.readline()) and not line.startswith("{"):
            pass
        if not line:
            raise click.ClickException(f"a side ended early: exit {self._process.wait()}")
        result: dict = json.loads(line)
        return result

    def ask(self, what: str, number: int) -> float:
        """Seconds that it took."""
        assert self._process.stdin
        self._process.stdin.write(f"{what} {number}\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.found |= {name: answer[name] for name in MEMORY}
        if "first_token_s" not in self.found:
            self.found["first_token_s"] = self.found["load_s"] + answer["seconds"]
        return float(answer["seconds"])

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def take_turns(sides: dict[str, Side], steps: int) -> None:
    """Everything that is measured; where there are two sides they take turns in it."""
    for batch in BATCHES:
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for side in sides.values():
            side.ask("prompt", batch)
            side.ask("steps", WARM_UP)
        for turn in range(steps // TURN):
            for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
                seconds[name].append(sides[name].ask("steps", TURN) / TURN)
        for name, side in sides.items():
            side.found[f"batch {batch}"] = batch / statistics.median(seconds[name])
            side.found[f"best batch {batch}"] = batch / min(seconds[name])
    for side in sides.values():
        side.found["prefill"] = PREFILL / side.ask("prefill", PREFILL)


def measure(source: Path, experts: int, work: Path, rounds: int, threads: int, steps: int) -> dict:
    checkpoint, gguf, remove = make_model(source, experts, work)
    logits = {name: work / f"logits-{name}.npy" for name in (*SIDES, "control")}

    def open_side(name: str) -> Side:
        return Side(name, checkpoint, gguf, threads, logits[name])

    try:
        with Checkpoint.open(checkpoint) as opened:
            config = ModelConfig.of(identify_model(opened))
        nbytes = {f"batch {b}": bytes_per_token(config, experts, b, CONTEXT).token for b in BATCHES}
        together = (2 + REPACKED) * gguf.stat().st_size < available_bytes()
        rows = []
        for number in range(rounds):
            order = SIDES if number % 2 == 0 else SIDES[::-1]
            row: dict = {
                "read_gb_s": child("bandwidth", "--threads", threads)["bytes_per_s"] / 1e9,
                "together": together,
            }
            for group in [order] if together else [order[:1], order[1:]]:
                sides = {name: open_side(name) for name in group}
                take_turns(sides, steps)
                for name, side in sides.items():
                    side.close()
                    row[name] = side.found
                    click.echo(f"{experts} experts, round {number}, {name}: {shown(side.found)}")
            row["agreement"] = agreement(logits["ours"], logits["llama.cpp"])
            if number == 0:
                child("control", checkpoint, "--threads", threads, "--logits", logits["control"])
                alone = agreement(logits["ours"], logits["control"])
            row["control"] = alone
            click.echo(
                f"read {row['read_gb_s']:.1f} GB/s, agreement {row['agreement']:.4f}, control {alone:.4f}"
            )
            rows.append(row)
        return summary(rows, nbytes)
    finally:
        remove()
        for file in logits.values():
            file.unlink(missing_ok=True)


def available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def agreement(one: Path, other: Path) -> float:
    """The median cosine of the two sides' logits over the prompts."""
    a, b = np.load(one), np.load(other)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(np.median((a * b).sum(-1) / norms))


def summary(rows: list[dict], nbytes: dict[str, float]) -> dict:
    result: dict = {"together": rows[0]["together"], "bytes_per_token": nbytes}
    result["agreement"], result["control"] = min(r["agreement"] for r in rows), rows[0]["control"]
    agree = result["agreement"] >= AGREEMENT * result["control"]
    for key in GOALS:
        ratios = [r["ours"][key] / r["llama.cpp"][key] for r in rows]
        result[f"ratio {key}"] = statistics.median(ratios) if agree else None
        result[f"range of ratio {key}"] = span(ratios) if agree else None
    for side in SIDES:
        result[side] = {
            key: statistics.median(r[side][key] for r in rows) for key in rows[0][side] if key != "name"
        }
        result[side]["name"] = rows[0][side]["name"]
        result[side]["share of read bandwidth"] = statistics.median(
            r[side]["batch 1"] * nbytes["batch 1"] / 1e9 / r["read_gb_s"] for r in rows
        )
    result["read_gb_s"] = statistics.median(r["read_gb_s"] for r in rows)
    return result


def shown(run: dict) -> str:
    return ", ".join(f"{k} {v:.2f}" for k, v in run.items() if isinstance(v, float))


def page(report: dict) -> list[str]:
    lines, models = heading("Our runtime and llama.cpp on the CPU", report), report["models"]
    names = {side: next(iter(models.values()))[side]["name"] for side in SIDES}
    lines += [
        f"- ours: {names['ours']}, MXFP4 products with activations of 16 bits; llama.cpp: {names['llama.cpp']}"
    ]
    goals = ", ".join(f"{key} {goal}" for key, goal in GOALS.items())
    lines += ["", f"Ratios are ours to llama.cpp's, medians over rounds; goals: {goals}.", ""]
    columns = ["experts", *(f"ratio {key}" for key in GOALS)]
    columns += ["cosine of logits", "ours in BF16 and float32", "reading memory", "measured"]
    rows = []
    for experts, model in models.items():
        ratios = [model[f"ratio {key}"] for key in GOALS]
        cells = ["logits disagree" if r is None else f"{r:.2f}" for r in ratios]
        cells += [f"{model['agreement']:.3f}", f"{model['control']:.3f}", f"{model['read_gb_s']:.1f} GB/s"]
        rows.append((experts, *cells, "in turns" if model["together"] else "one after the other"))
    lines += [*table(columns, rows), ""]
    figures = {
        "batch 1": "tokens/s, batch 1",
        "share of read bandwidth": "share of read bandwidth",
        "batch 8": "tokens/s, batch 8",
        "prefill": "prompt tokens/s",
        "load_s": "load s",
        "first_token_s": "first token s",
        "private_mib": "private MiB",
        "mapped_mib": "mapped MiB",
        "peak_rss_mib": "peak resident MiB",
    }
    rows = [
        (experts, side, *(f"{model[side][key]:.{0 if 'mib' in key else 2}f}" for key in figures))
        for experts, model in models.items()
        for side in SIDES
    ]
    return [*lines, *table(("experts", "side", *figures.values()), rows)]


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), help="Scratch folder.")
@click.option("--experts", type=int, multiple=True, help="Default: 4, 8 and 32.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--steps", default=32, show_default=True, help="Decoded at each batch size and round.")
@click.option("--tiny", is_flag=True, help="Run on example:tiny, with results in --work.")
def main(
    work: Path | None,
    experts: tuple[int, ...],
    rounds: int,
    threads: int,
    steps: int,
    tiny: bool,
) -> None:
    if work is None:
        raise click.UsageError("--work FOLDER is missing")
    if find_spec("llama_cpp") is None:
        raise click.ClickException("llama-cpp-python is missing: pip install llama-cpp-python")
    work.mkdir(parents=True, exist_ok=True)
    source = resolve("example:tiny") if tiny else work / "full"
    if not source.exists():
        make_checkpoint(source, gpt_oss_20b(), 3)
    report = {
        **begin(
            f"python -m benchmarks.beside_llama_cpp: processes in turn, {rounds} rounds, {threads} threads each, "
            f"{steps} steps after a prompt of {PROMPT}, a prompt of {PREFILL}; random weights.",
            work,
        ),
        "models": {str(n): measure(source, n, work, rounds, threads, steps) for n in experts or (4, 8, 32)},
    }
    publish("llama_cpp", report, page(report), work if tiny else RESULTS)


if __name__ == "__main__":
    main()
