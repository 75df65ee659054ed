"""llama.cpp and our runtime on the CPU, alternately in one run, on the same weights with the same threads.

    python benchmarks/beside_llama_cpp.py --work FOLDER [--experts 4 --experts 8 --experts 32] [--rounds 3]
    python benchmarks/beside_llama_cpp.py --work FOLDER --tiny          # the script itself, in a minute

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

import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import click
import numpy as np
from machine import describe_machine
from make_checkpoint import Shape, make_checkpoint

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.locate import locate
from moe_surgery.families import describe
from moe_surgery.runtime.config import ModelConfig
from moe_surgery.runtime.decode_cost import bytes_per_token

RESULTS = Path(__file__).parent / "results"
SIDES = ("ours", "llama.cpp")
PROMPT, PREFILL, BATCHES = 16, 512, (1, 8)
WARM_UP = 3
TURN = 4  # steps between one side's turn and the other's
CONTEXT = 256
READ_BYTES, READ_PASSES = 1 << 30, 5
REPACKED = 0.8
"""Of its file, what llama.cpp holds a second time: its experts in another order."""
MEMORY = {"private_mib": "RssAnon", "mapped_mib": "RssFile", "peak_rss_mib": "VmHWM"}
AGREEMENT = 0.8
"""Least cosine of the two sides' logits, as a share of the control's."""
GOALS = {"batch 1": 1.0, "batch 8": 1.0, "prefill": 0.5}
MIB = 1 << 20


def status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def prompts(vocabulary: int, batch: int, length: int) -> np.ndarray:
    """Tokens int64 [batch, length]; the first row of every batch is the same."""
    return np.random.default_rng(length).integers(0, vocabulary, (batch, length))


# --- one side, in a process of its own


class Ours:
    def __init__(self, checkpoint: str, _: str, threads: int, dtype: str | None = None) -> None:
        import torch

        from moe_surgery.runtime.load import load_model

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = load_model(checkpoint, dtype=dtype and getattr(torch, dtype))
        self.name = f"{self._model.backend.name} backend, {self._model.dtype}"

    def begin(self, batch: int, context: int) -> None:
        self._cache = self._model.new_cache(batch, context)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Logits [batch, vocabulary] behind the last column of tokens [batch, n]."""
        ids = self._torch.from_numpy(np.ascontiguousarray(tokens))
        logits: np.ndarray = self._model(ids, self._cache, logits_to_keep=1)[:, -1].float().numpy()
        return logits


class Llama:
    """llama.cpp through its C interface: as many sequences as the largest batch."""

    def __init__(self, _: str, gguf: str, threads: int) -> None:
        import llama_cpp as api

        self._api = api
        self._model = api.llama_model_load_from_file(gguf.encode(), api.llama_model_default_params())
        options = api.llama_context_default_params()
        options.n_ctx = max(PREFILL + 32, max(BATCHES) * 256)
        options.n_batch = options.n_ubatch = PREFILL
        options.n_seq_max = max(BATCHES)
        options.kv_unified = True
        options.n_threads = options.n_threads_batch = threads
        self._context = api.llama_init_from_model(self._model, options)
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._batch = api.llama_batch_init(PREFILL, 0, 1)
        self.name = f"llama-cpp-python {api.__version__}"

    def begin(self, batch: int, context: int) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        self._position = 0

    def step(self, tokens: np.ndarray) -> np.ndarray:
        batch, (sequences, length) = self._batch, tokens.shape
        batch.n_tokens = tokens.size
        for number, (sequence, place) in enumerate(np.ndindex(sequences, length)):
            batch.token[number] = int(tokens[sequence, place])
            batch.pos[number] = self._position + place
            batch.n_seq_id[number] = 1
            batch.seq_id[number][0] = sequence
            batch.logits[number] = place == length - 1
        if self._api.llama_decode(self._context, batch):
            raise click.ClickException("llama_decode failed")
        self._position += length
        rows = [
            np.ctypeslib.as_array(
                self._api.llama_get_logits_ith(self._context, (s + 1) * length - 1), (self._vocabulary,)
            )
            for s in range(sequences)
        ]
        return np.stack(rows)


def serve(side: str, checkpoint: str, gguf: str, threads: int, logits: str) -> None:
    """One side in this process: load, then do what each line of the input says, one line of JSON for each.

    The libraries are imported before the clock starts: what is timed is the model. The logits of the
    prompts go to the file `logits`.
    """
    import_module("moe_surgery.runtime.load" if side == "ours" else "llama_cpp")
    vocabulary, kept = vocabulary_of(checkpoint), []
    start = time.perf_counter()
    runner = (Ours if side == "ours" else Llama)(checkpoint, gguf, threads)
    print(json.dumps({"load_s": time.perf_counter() - start, "name": runner.name}), flush=True)
    last = np.zeros((1, 1))
    for line in sys.stdin:
        what, number = line.split()
        begin = time.perf_counter()
        if what == "prompt":  # as a batch of so many
            runner.begin(int(number), CONTEXT)
            last = runner.step(prompts(vocabulary, int(number), PROMPT))
            kept.append(last)
        elif what == "steps":
            for _ in range(int(number)):
                last = runner.step(last.argmax(-1)[:, None])
        elif what == "prefill":
            runner.begin(1, int(number) + 1)
            runner.step(prompts(vocabulary, 1, int(number)))
        seconds = time.perf_counter() - begin
        said = {name: status_mib(key) for name, key in MEMORY.items()}
        print(json.dumps({"seconds": seconds, **said}), flush=True)
    np.save(logits, np.concatenate(kept))


def run_control(checkpoint: str, threads: int, logits: str) -> dict:
    """Ours in BF16: the logits of the prompts go to the file `logits`."""
    runner, kept = Ours(checkpoint, "", threads, "bfloat16"), []
    for batch in BATCHES:
        runner.begin(batch, PROMPT + 1)
        kept.append(runner.step(prompts(vocabulary_of(checkpoint), batch, PROMPT)))
    np.save(logits, np.concatenate(kept))
    return {}


def vocabulary_of(checkpoint: str) -> int:
    with Checkpoint.open(checkpoint) as opened:
        return ModelConfig.of(describe(opened)).vocabulary


def read_bandwidth(threads: int) -> float:
    """Bytes a second that `threads` threads read from memory, each its own block, by libc's memchr."""
    library = ctypes.CDLL(None)
    library.memchr.restype = ctypes.c_void_p
    library.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    share = READ_BYTES // threads
    blocks = [np.full(share, 1, np.uint8) for _ in range(threads)]

    def search(block: np.ndarray) -> None:
        assert library.memchr(block.ctypes.data, 0, share) is None

    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(READ_PASSES):
            begin = time.perf_counter()
            list(pool.map(search, blocks))
            best = max(best, share * threads / (time.perf_counter() - begin))
    return best


# --- the run


def child(*arguments: object) -> dict:
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(
            f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()[-800:]}"
        )
    found: dict = json.loads(done.stdout.splitlines()[-1])
    return found


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
        whole = describe(opened).experts == experts
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
        arguments = ("--side", name, checkpoint, gguf, "--threads", threads, "--logits", logits)
        self._process = subprocess.Popen(
            [sys.executable, __file__, *map(str, arguments)],
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
        found: dict = json.loads(line)
        return found

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
            config = ModelConfig.of(describe(opened))
        nbytes = {f"batch {b}": bytes_per_token(config, experts, b, CONTEXT).token for b in BATCHES}
        together = (2 + REPACKED) * gguf.stat().st_size < available_bytes()
        rows = []
        for number in range(rounds):
            order = SIDES if number % 2 == 0 else SIDES[::-1]
            row: dict = {
                "read_gb_s": child("--bandwidth", threads)["bytes_per_s"] / 1e9,
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
                control = (
                    "--side",
                    "control",
                    checkpoint,
                    "--threads",
                    threads,
                    "--logits",
                    logits["control"],
                )
                child(*control)
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
    result: dict = {"rounds": rows, "bytes_per_token": nbytes}
    result["agreement"], result["control"] = min(r["agreement"] for r in rows), rows[0]["control"]
    agree = result["agreement"] >= AGREEMENT * result["control"]
    for key in GOALS:
        ratios = [r["ours"][key] / r["llama.cpp"][key] for r in rows]
        result[f"ratio {key}"] = statistics.median(ratios) if agree else None
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


def as_markdown(report: dict) -> str:
    lines = ["# Our runtime and llama.cpp on the CPU", "", str(report["how"]), ""]
    lines += [f"- {name}: {value}" for name, value in report["machine"].items()]
    names = {side: next(iter(report["models"].values()))[side]["name"] for side in SIDES}
    lines += [f"- ours: {names['ours']}; llama.cpp: {names['llama.cpp']}"]
    goals = ", ".join(f"{key} {goal}" for key, goal in GOALS.items())
    lines += ["", f"Ratios are ours to llama.cpp's, medians over rounds; goals: {goals}.", ""]
    lines += [
        "| experts | ratio "
        + " | ratio ".join(GOALS)
        + " | cosine of logits | ours in BF16 and float32 | reading memory | measured |"
    ]
    lines += ["|---" * (len(GOALS) + 5) + "|"]
    for experts, model in report["models"].items():
        ratios = [model[f"ratio {key}"] for key in GOALS]
        cells = ["logits disagree" if r is None else f"{r:.2f}" for r in ratios]
        cells += [f"{model['agreement']:.3f}", f"{model['control']:.3f}", f"{model['read_gb_s']:.1f} GB/s"]
        cells.append("in turns" if model["rounds"][0]["together"] else "one after the other")
        lines.append(f"| {experts} | {' | '.join(cells)} |")
    columns = {
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
    lines += [
        "",
        "| experts | side | " + " | ".join(columns.values()) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for experts, model in report["models"].items():
        for side in SIDES:
            cells = [f"{model[side][key]:.{0 if 'mib' in key else 2}f}" for key in columns]
            lines.append(f"| {experts} | {side} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@click.command(help=__doc__)
@click.argument("files", nargs=-1)
@click.option("--work", type=click.Path(path_type=Path), help="Scratch folder.")
@click.option("--experts", type=int, multiple=True, help="Default: 4, 8 and 32.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option("--steps", default=32, show_default=True, help="Decoded at each batch size and round.")
@click.option("--tiny", is_flag=True, help="Run on example:tiny, and print instead of writing results.")
@click.option("--side", type=click.Choice([*SIDES, "control"]), hidden=True)
@click.option("--logits", hidden=True)
@click.option("--bandwidth", type=int, hidden=True)
def main(
    files: tuple[str, ...],
    work: Path | None,
    experts: tuple[int, ...],
    rounds: int,
    threads: int,
    steps: int,
    tiny: bool,
    side: str | None,
    logits: str,
    bandwidth: int | None,
) -> None:
    if bandwidth:
        click.echo(json.dumps({"bytes_per_s": read_bandwidth(bandwidth)}))
        return
    if side == "control":
        click.echo(json.dumps(run_control(files[0], threads, logits)))
        return
    if side:
        serve(side, files[0], files[1], threads, logits)
        return
    if work is None:
        raise click.UsageError("--work FOLDER is missing")
    if find_spec("llama_cpp") is None:
        raise click.ClickException("llama-cpp-python is missing: pip install llama-cpp-python")
    work.mkdir(parents=True, exist_ok=True)
    source = locate("example:tiny") if tiny else work / "full"
    if not source.exists():
        make_checkpoint(source, Shape(), 3)
    report = {
        "how": f"python benchmarks/beside_llama_cpp.py: processes in turn, {rounds} rounds, {threads} threads each, "
        f"{steps} steps after a prompt of {PROMPT}, a prompt of {PREFILL}; random weights.",
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(work),
        "models": {str(n): measure(source, n, work, rounds, threads, steps) for n in experts or (4, 8, 32)},
    }
    if not tiny:
        (RESULTS / "llama_cpp.json").write_text(json.dumps(report, indent=1) + "\n")
        (RESULTS / "llama_cpp.md").write_text(as_markdown(report))
    click.echo(as_markdown(report))


if __name__ == "__main__":
    main()
