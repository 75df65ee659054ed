"""profile and search on a full-size checkpoint inside a memory cgroup, beside reading a prompt and what the work's
reads and sums must cost.

    python -m benchmarks.profile_budget --work FOLDER [--tokens 4096] [--search-tokens 512] [--limit 2147483648]

FOLDER/full is made (13.8 GB) where it is not there, and given a tokenizer. `profile` starts with its files outside
the page cache. Prompts, of 2048 tokens and of as many as are profiled, are read by a process without a limit, with
all weights in memory, before `profile` and after it, since the machine's speed changes: shares are of the mean of
both. `search` and a `profile` beside it get fewer tokens. The bound is the larger of two times: all weights but the
unembedding read once at the rate at which the checkpoint's file is read here, and the products' operations at the
rate of a large BF16 matrix product of torch here, both measured in this run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import click

from benchmarks.cgroup import enter_command, memory_cgroup
from benchmarks.layout import Shape, gpt_oss_20b
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.make_tokenizer import make_tokenizer
from benchmarks.publish import begin, heading, publish, table
from moe_surgery import inspect


def read_rate(file: Path, nbytes: int = 2 << 30) -> float:
    """Bytes a second of reading the start of `file` once, a MiB at a time."""
    done, start = 0, time.perf_counter()
    with open(file, "rb", buffering=0) as opened:
        buffer = bytearray(1 << 20)
        while done < nbytes and (count := opened.readinto(buffer)):
            done += count
    return done / (time.perf_counter() - start)


def drop_from_cache(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


PREFILL = """
import sys, time, torch
from moe_surgery import load_model
model = load_model(sys.argv[1])
ids = torch.randint(0, model.config.vocab_size, (1, int(sys.argv[2])), generator=torch.Generator().manual_seed(0))
model(ids[:, :256], logits_to_keep=1)
for tokens in (2048, ids.shape[1]):
    start = time.perf_counter()
    model(ids[:, :tokens], logits_to_keep=1)
    print(tokens / (time.perf_counter() - start))
"""


def prefill_rates(full: Path, tokens: int) -> tuple[float, float]:
    """Tokens a second of a prompt of 2048 and of `tokens` tokens, by a process whose weights are in memory."""
    command = [sys.executable, "-c", PREFILL, str(full), str(tokens)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    short, whole = map(float, printed.split())
    return short, whole


def product_rate(size: int = 2880) -> float:
    """Operations a second of a BF16 product of torch, the best of five."""
    import torch

    a, b = torch.randn(1024, size).bfloat16(), torch.randn(size, 2 * size).bfloat16()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 1024 * size * 2 * size / min(times)


def operations(tokens: int, shape: Shape) -> float:
    """Multiplications and additions of all products but attention's scores and the unembedding."""
    query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = shape.hidden * (2 * query + 2 * key_value)
    experts = shape.top_k * 3 * shape.hidden * shape.intermediate
    return 2.0 * tokens * shape.layers * (attention + experts + shape.hidden * shape.experts)


def run(
    job: str, full: Path, text: Path, tokens: int, out: Path, limit: int, *options: str
) -> dict[str, float]:
    command = [sys.executable, "-m", "moe_surgery", job, str(full), "--texts", str(text)]
    command += ["--max-tokens", str(tokens), "-o", str(out), "-q", *options]
    with memory_cgroup(limit) as group:
        if group is None:
            raise click.ClickException("needs root and a memory cgroup")
        start = time.perf_counter()
        process = subprocess.Popen(enter_command(group[0], command))
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise click.ClickException(f"{' '.join(command)}: exit {process.returncode}")
        return {
            "seconds": seconds,
            "processor_seconds": used.ru_utime,
            "peak_rss_mib": used.ru_maxrss / 1024,
            "charged_peak_mib": int(group[1].read_text()) / (1 << 20),
        }


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--tokens", default=4096, show_default=True)
@click.option("--search-tokens", default=512, show_default=True)
@click.option("--limit", default=2 << 30, show_default=True, help="Bytes of memory allowed.")
def main(work: Path, tokens: int, search_tokens: int, limit: int) -> None:
    full, text = work / "full", work / "profile.txt"
    if not full.exists():
        make_checkpoint(full, gpt_oss_20b(), 3)
    if not (full / "tokenizer.json").exists():
        make_tokenizer(full, gpt_oss_20b().vocabulary)
    library = Path(sysconfig.get_paths()["stdlib"])
    text.write_text("".join(f.read_text() for f in sorted(library.glob("a*.py"))))
    weights = inspect(full)
    read = weights.nbytes - weights.parts["embedding and unembedding"]
    drop_from_cache(full)
    rates = {"read": read_rate(max(full.glob("*.safetensors"))), "products": product_rate()}
    before = prefill_rates(full, tokens)
    drop_from_cache(full)
    result = run("profile", full, text, tokens, work / "profile.stats", limit)
    rate = tokens / result["seconds"]
    prefill, whole = (sum(rates) / 2 for rates in zip(before, prefill_rates(full, tokens), strict=True))
    beside = run("profile", full, text, search_tokens, work / "profile-less.stats", limit)["seconds"]
    searched = run("search", full, text, search_tokens, work / "search.json", limit)
    bound = max(read / rates["read"], operations(tokens, gpt_oss_20b()) / rates["products"])
    report = {
        **begin(
            f"python -m benchmarks.profile_budget --tokens {tokens} --search-tokens {search_tokens}, in a cgroup "
            f"of {limit / (1 << 30):.2f} GiB, default backend and dtype.",
            work,
        ),
        "figures": {
            **result,
            "tokens_per_second": rate,
            "prompt_tokens_per_second": prefill,
            "share_of_the_prompts_rate": rate / prefill,
            "prompt_of_as_many_tokens_per_second": whole,
            "share_of_that_prompts_rate": rate / whole,
            "tokens_of_search": search_tokens,
            "search_seconds": searched["seconds"],
            "search_charged_peak_mib": searched["charged_peak_mib"],
            "profile_seconds_beside_search": beside,
            "search_to_profile": searched["seconds"] / beside,
            "bytes_read_gb": read / 1e9,
            "read_gb_per_second": rates["read"] / 1e9,
            "teraoperations": operations(tokens, gpt_oss_20b()) / 1e12,
            "gigaoperations_per_second": rates["products"] / 1e9,
            "bound_seconds": bound,
            "times_the_bound": result["seconds"] / bound,
        },
    }
    rows = [(name, f"{value:.4g}") for name, value in report["figures"].items()]
    lines = heading("profile and search on a full-size checkpoint", report)
    publish("profile_budget", report, [*lines, "", *table(("figure", "value"), rows)])


if __name__ == "__main__":
    main()
