"""Our runtime, llama.cpp and ik_llama.cpp on the CPU, in turn on the same weights; to results/peers.{json,md}.

    python -m benchmarks.beside_peers --work FOLDER --experts 8 --dense keep [--rounds 2] [--long] [--isa avx512vnni]

One model a call, so that a call takes minutes; calls add their model to what is published. FOLDER/full is the
full-size checkpoint (`make_checkpoint`), pruned to `--experts` where it has more, and exported to GGUF with `--dense`;
ours reads the checkpoint with the same dense weights. With `--isa` ours is another side once more, with an instruction
set that is not the best here.
In every round each side is one process after the other, in an order that changes by round: it loads, warms up,
reads a prompt of 512 tokens (with `--long` in the first round also one of 2048), and decodes at batch 1 and 8. Rates
are the best over rounds, since others may use the machine; ratios are ours to a side's. Weights are random: speed,
not quality.
The packages are llama-cpp-python and ik-llama-cpp-python; a side whose package is missing is left out, one that ends
early is named with what it said.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import click

from benchmarks.decode_sides import LIBRARIES, LONGEST, PREFILL
from benchmarks.publish import begin, heading, load, publish, table
from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.resolve import resolve
from moe_surgery.families import identify_model

FIGURES = {
    f"prefill {PREFILL}": "prompt of 512",
    f"prefill {LONGEST}": "prompt of 2048",
    "batch 1": "batch 1",
    "batch 8": "batch 8",
}
WARM_UP, STEPS = 2, 16
TOUCHING = 64  # tokens of a first prompt, which reads the weights
UNIT = "tokens/s"


def sides(isas: Sequence[str]) -> list[str]:
    libraries = (side for side, module in LIBRARIES.items() if find_spec(module.partition(".")[0]))
    return ["ours", *(f"ours, {isa}" for isa in isas), *libraries]


def make_model(source: Path, experts: int, dense: str, work: Path) -> tuple[Path, Path]:
    """A checkpoint of `experts` experts and its export; those of an earlier call are used again."""
    with Checkpoint.open(source) as opened:
        whole = identify_model(opened).experts == experts
    tool = [sys.executable, "-m", "moe_surgery"]
    checkpoint = source if whole else work / f"pruned-{experts}"
    gguf = work / f"peers-{experts}-{dense}.gguf"
    if not checkpoint.exists():
        subprocess.run([*tool, "prune", source, checkpoint, "--keep", f"0-{experts - 1}", "-q"], check=True)
    if not gguf.exists():
        # Token numbers are all that is measured: a tokenizer would change nothing.
        command = [*tool, "export", checkpoint, gguf, "--no-tokenizer", "--dense", dense, "-q"]
        subprocess.run([*map(str, command)], check=True)
    return checkpoint, gguf


class Ended(Exception):
    pass


def run_side(
    side: str, checkpoint: Path, gguf: Path, dense: str, threads: int, long: bool
) -> dict[str, object]:
    """What one process of a side measured. Raises Ended where it ends early."""
    which, _, isa = side.partition(", ")
    command = [sys.executable, "-m", "benchmarks.decode_sides", which, checkpoint, gguf, "--dense", dense]
    command += ["--isa", isa] if isa else []
    said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe would have to be emptied meanwhile
    process = subprocess.Popen(
        [*map(str, command), "--threads", str(threads), "--logits", os.devnull],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=said,
        text=True,
    )

    def answer() -> dict[str, object]:
        assert process.stdout
        while (line := process.stdout.readline()) and not line.startswith("{"):
            pass
        if not line:
            code = process.wait()
            said.seek(0)
            lines = [text for text in said.read().splitlines() if text.strip()]
            raise Ended(f"exit {code}: {lines[-1] if lines else 'no message'}")
        found: dict[str, object] = json.loads(line)
        return found

    def ask(what: str, number: int) -> float:
        assert process.stdin
        with suppress(BrokenPipeError):
            process.stdin.write(f"{what} {number}\n")
            process.stdin.flush()
        return float(str(answer()["seconds"]))

    result = answer()
    ask("prefill", TOUCHING)
    result[f"prefill {PREFILL}"] = PREFILL / ask("prefill", PREFILL)
    if long:
        result[f"prefill {LONGEST}"] = LONGEST / ask("prefill", LONGEST)
    for batch in (1, 8):
        ask("prompt", batch)
        ask("steps", WARM_UP)
        result[f"batch {batch}"] = batch * STEPS / ask("steps", STEPS)
    process.kill()
    process.communicate()
    return result


def measure(
    checkpoint: Path, gguf: Path, dense: str, isas: Sequence[str], rounds: int, threads: int, long: bool
) -> dict[str, dict]:
    found: dict[str, dict] = {side: {} for side in sides(isas)}
    for number in range(rounds):
        for side in list(found)[:: 1 if number % 2 == 0 else -1]:
            if "ended" in found[side]:
                continue
            try:
                run = run_side(side, checkpoint, gguf, dense, threads, long and number == 0)
            except Ended as reason:
                found[side] = {"ended": str(reason)}
                click.echo(f"{side}: {reason}")
                continue
            click.echo(f"{gguf.name}, round {number}, {side}: {run}")
            for key, value in run.items():
                best = min if key == "load_s" else max
                found[side][key] = best(found[side][key], value) if key in found[side] else value
    return found


def page(report: dict) -> list[str]:
    lines = heading("Our runtime, llama.cpp and ik_llama.cpp on the CPU", report)
    names = {side: m[side]["name"] for m in report["models"].values() for side in m if "name" in m[side]}
    lines += [f"- {side}: {name}" for side, name in names.items()]
    rows = []
    for model, by_side in report["models"].items():
        own_sides = [side for side in by_side if side.startswith("ours")]
        for side, found in by_side.items():
            cells = []
            for key in FIGURES:
                rate = found.get(key)
                shown = "" if rate is None else f"{rate:.1f}"
                if rate is not None and not side.startswith("ours"):
                    ratios = (f"{by_side[own][key] / rate:.2f}" for own in own_sides if key in by_side[own])
                    shown += f" ({', '.join(ratios)})"
                cells.append(shown)
            rows.append((model, side, *cells, found.get("ended", "")))
    columns = ("model", "side", *(f"{name}, {UNIT}" for name in FIGURES.values()), "ended early")
    return [
        *lines,
        "",
        "In brackets: each of ours to this side's, in their order.",
        "",
        *table(columns, rows),
    ]


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Scratch folder.")
@click.option("--experts", type=int, default=32, show_default=True)
@click.option("--dense", type=click.Choice(["keep", "q8_0"]), default="keep", show_default=True)
@click.option("--rounds", default=2, show_default=True)
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--isa", "isas", multiple=True, help="Ours once more, with this instruction set.")
@click.option("--long", is_flag=True, help=f"Also a prompt of {LONGEST} tokens.")
@click.option("--make-only", is_flag=True, help="Only make the files.")
@click.option("--remove", is_flag=True, help="Remove the files that were made.")
@click.option("--tiny", is_flag=True, help="Run on example:tiny, with results in --work.")
def main(
    work: Path,
    experts: int,
    dense: str,
    rounds: int,
    threads: int,
    isas: tuple[str, ...],
    long: bool,
    make_only: bool,
    remove: bool,
    tiny: bool,
) -> None:
    work.mkdir(parents=True, exist_ok=True)
    source = resolve("example:tiny") if tiny else work / "full"
    checkpoint, gguf = make_model(source, experts, dense, work)
    if not make_only:
        folder = {"folder": work} if tiny else {}
        name = f"{experts} experts, dense weights in {'BF16' if dense == 'keep' else 'Q8_0'}"
        report = begin(
            f"python -m benchmarks.beside_peers, a call for each model: processes in turn, {threads} threads each, the "
            f"best of {rounds} rounds, {STEPS} steps after a prompt of 16; random weights. Ours reads the checkpoint, "
            "the others its GGUF file; ours in Q8_0 makes 8 bits of the same dense weights.",
            work,
        )
        earlier = load("peers", **folder)
        same = earlier is not None and earlier["machine"]["processor"] == report["machine"]["processor"]
        report["models"] = earlier["models"] if earlier is not None and same else {}
        report["models"][name] = measure(checkpoint, gguf, dense, isas, rounds, threads, long)
        publish("peers", report, page(report), **folder)
    if remove:
        gguf.unlink(missing_ok=True)
        if checkpoint != source:
            shutil.rmtree(checkpoint, ignore_errors=True)


if __name__ == "__main__":
    main()
