"""Dense weights in 8 bits (`dense="q8_0"`) beside BF16 on the CPU: speed and memory at full size, and their cost.

    python -m benchmarks.dense_q8_0 --work FOLDER [--part batch-1 --part batch-8 ...]

FOLDER holds, or is given, a checkpoint of gpt-oss-20b's sizes with random weights (13.76 GB). `batch-1`, `batch-8`
and `batch-16` load it twice in one process and decode in turns (`bench decode`). `prompt` is a process for each:
seconds to load, a prompt of 512 tokens, and memory after decoding. `logits` is what 8 bits change in the logits at
full size, beside what BF16 activations change; routers of random weights have near ties that any rounding
decides, so the median token counts. `texts` is the same on the bundled model, as KL divergence on generated
texts of its five domains (questions it was trained on, with answers, and running text). Each part replaces its
figures in benchmarks/results/.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.decode_sides import status_mib
from benchmarks.layout import gpt_oss_20b
from benchmarks.make_checkpoint import make_checkpoint
from benchmarks.publish import begin, heading, load, publish, table
from moe_surgery.examples.skills import DOMAINS, documents
from moe_surgery.runtime.load import load_model
from moe_surgery.runtime.text import Text

NAME = "dense_q8_0"
FORMATS = ("keep", "q8_0")
LABELS = {"keep": "BF16", "q8_0": "Q8_0"}
DEPTH, STEPS = 16, 8
ROUNDS = {1: 5, 8: 3, 16: 3}
PARTS = (*(f"batch-{batch}" for batch in ROUNDS), "prompt", "logits", "texts")
PROMPT, NEW_TOKENS = 512, 16
DOCUMENTS, SEED = 8, 3
EXAMPLE = "example:tiny"


def decode(full: Path, batch: int) -> dict[str, Any]:
    """Rows by format, of `bench decode`."""
    dense = [option for name in FORMATS for option in ("--dense", name)]
    settings = ("--batches", batch, "--depth", DEPTH, "--steps", STEPS, "--rounds", ROUNDS[batch])
    command = ["bench", "decode", full, *dense, *settings, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "moe_surgery", *map(str, command)], check=True, stdout=subprocess.PIPE
    )
    found = json.loads(done.stdout)
    return {
        "batch": batch,
        "read_bytes_per_s": found["read_bandwidth"],
        "rows": [
            {
                "dense": LABELS[name],
                "tokens_per_s": row["decode_rate"],
                "ratio": row["ratio"],
                "step_s": row["latency"],
                "bytes_per_step": row["bytes_per_token"] * batch,
                "share_of_read_rate": row["bandwidth_share"],
            }
            for name, row in zip(FORMATS, found["rows"], strict=True)
        ],
    }


def run_model(full: str, dense: str) -> dict[str, float]:
    """Load, read a prompt and decode in this process."""
    start = time.perf_counter()
    model = load_model(full, dense=dense)
    loaded = time.perf_counter()
    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(1, PROMPT + NEW_TOKENS)
    logits = model(ids, cache, logits_to_keep=1)
    prefilled = time.perf_counter()
    for _ in range(NEW_TOKENS):
        logits = model(logits[:, -1:].argmax(-1), cache)
    return {
        "load_s": loaded - start,
        "prompt_tokens_per_s": PROMPT / (prefilled - loaded),
        "private_mib": status_mib("RssAnon"),
        "mapped_mib": status_mib("RssFile"),
    }


def prompt(full: Path) -> dict[str, Any]:
    result = {}
    for dense in FORMATS:
        command = [sys.executable, "-m", f"benchmarks.{NAME}", "--one", dense, "--work", str(full.parent)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        result[LABELS[dense]] = json.loads(done.stdout)
    return result


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Error by norm of the median token."""
    return float(((got - exact).norm(dim=-1) / exact.norm(dim=-1)).median())


def logits(full: Path) -> dict[str, Any]:
    """Of 8 sequences of 4 tokens: a changed route changes few tokens after it."""
    settings = {"exact": {}, "Q8_0": {"dense": "q8_0"}, "BF16 activations": {"dtype": torch.bfloat16}}
    found = {}
    for name, options in settings.items():
        model = load_model(full, **options)  # type: ignore[arg-type]
        ids = torch.randint(0, model.config.vocab_size, (8, 4), generator=torch.Generator().manual_seed(1))
        found[name] = model(ids).flatten(0, 1)
        del model
    exact = found.pop("exact")
    return {
        "tokens": len(exact),
        "median_relative_error": {name: relative(got, exact) for name, got in found.items()},
        "same_greedy_token": {
            name: float((got.argmax(-1) == exact.argmax(-1)).float().mean()) for name, got in found.items()
        },
    }


def texts() -> list[dict[str, Any]]:
    """By domain: mean KL divergence from the model as stored, nats a token, and how often the greedy token stays."""
    text, exact = Text(EXAMPLE), load_model(EXAMPLE)
    others = {
        "Q8_0": load_model(EXAMPLE, dense="q8_0"),
        "BF16 activations": load_model(EXAMPLE, dtype=torch.bfloat16),
    }
    rows = []
    for domain in DOMAINS:
        sums = dict.fromkeys(others, 0.0)
        same = dict.fromkeys(others, 0)
        loss, losses, tokens = 0.0, dict.fromkeys(others, 0.0), 0
        for document in documents(domain, DOCUMENTS, SEED):
            ids = torch.tensor([text.encode(document)[:256]])
            expected = torch.log_softmax(exact(ids)[0, :-1].double(), -1)
            following = ids[0, 1:, None]
            loss -= float(expected.gather(-1, following).sum())
            tokens += len(expected)
            for name, model in others.items():
                got = torch.log_softmax(model(ids)[0, :-1].double(), -1)
                sums[name] += float((expected.exp() * (expected - got)).sum())
                same[name] += int((got.argmax(-1) == expected.argmax(-1)).sum())
                losses[name] -= float(got.gather(-1, following).sum())
        rows.append(
            {
                "domain": domain,
                "tokens": tokens,
                "loss": loss / tokens,
                "loss_q8_0": losses["Q8_0"] / tokens,
                "kl": {name: value / tokens for name, value in sums.items()},
                "same_greedy_token": {name: value / tokens for name, value in same.items()},
            }
        )
    return rows


def page(report: dict[str, Any]) -> list[str]:
    lines = heading("Dense weights in 8 bits beside BF16, CPU", report)
    if decoded := [found for batch in ROUNDS if (found := report.get(f"batch-{batch}"))]:
        lines += [
            "",
            "## Decoding at full size",
            "",
            f"32 experts, top 4, {DEPTH} tokens in the cache; medians over rounds, smallest and largest in brackets. "
            "Shares are of a plain read loop just before each run; its median is beside them.",
            "",
        ]
        rows: list[tuple[object, ...]] = [
            (
                found["batch"],
                row["dense"],
                interval(row["tokens_per_s"]),
                "" if row["dense"] == "BF16" else interval(row["ratio"]),
                f"{row['step_s'] * 1e3:.0f}",
                f"{row['bytes_per_step'] / 1e9:.2f}",
                f"{row['share_of_read_rate']:.2f}",
                f"{found['read_bytes_per_s'] / 1e9:.1f}",
            )
            for found in decoded
            for row in found["rows"]
        ]
        columns = (
            "batch",
            "dense",
            "tokens/s",
            "to BF16",
            "ms a step",
            "GB a step",
            "share of read loop",
            "GB/s",
        )
        lines += table(columns, rows)
    if found := report.get("prompt"):
        lines += ["", f"## Loading, a prompt of {PROMPT} tokens, memory", ""]
        header = ("dense", "seconds to load", "prompt tokens/s", "private MiB", "mapped MiB")
        keys = ("load_s", "prompt_tokens_per_s", "private_mib", "mapped_mib")
        lines += table(header, [(name, *(f"{run[key]:.2f}" for key in keys)) for name, run in found.items()])
    if found := report.get("logits"):
        lines += [
            "",
            "## Logits at full size",
            "",
            f"{found['tokens']} random tokens, against BF16 weights with float32 activations. Routers of random "
            "weights nearly tie, so that any rounding sends some tokens to other experts.",
            "",
        ]
        same = found["same_greedy_token"]
        lines += table(
            ("changed", "relative error, median token", "same greedy token"),
            [(n, f"{e:.4f}", f"{same[n]:.2f}") for n, e in found["median_relative_error"].items()],
        )
    if found := report.get("texts"):
        lines += [
            "",
            f"## Texts with the bundled model ({EXAMPLE})",
            "",
            "Mean KL divergence from the model as stored, nats a token; loss in nats a token.",
            "",
        ]
        domain_columns = (
            "domain",
            "tokens",
            "KL, Q8_0",
            "KL, BF16 activations",
            "same greedy token",
            "loss",
            "loss, Q8_0",
        )
        lines += table(
            domain_columns,
            [
                (
                    row["domain"],
                    row["tokens"],
                    *(f"{row['kl'][name]:.2e}" for name in ("Q8_0", "BF16 activations")),
                    f"{row['same_greedy_token']['Q8_0']:.4f}",
                    f"{row['loss']:.4f}",
                    f"{row['loss_q8_0']:.4f}",
                )
                for row in found
            ],
        )
    return lines


def interval(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['low']:.2f}-{value['high']:.2f})"


@click.command(help=__doc__)
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="Folder of the checkpoint `full`."
)
@click.option(
    "--part", "parts", type=click.Choice(PARTS), multiple=True, help="Repeat for more; default: all."
)
@click.option("--one", hidden=True)
def main(work: Path, parts: tuple[str, ...], one: str | None) -> None:
    full = work / "full"
    if one:
        click.echo(json.dumps(run_model(str(full), one)))
        return
    chosen = parts or PARTS
    if not full.exists() and set(chosen) != {"texts"}:
        make_checkpoint(full, gpt_oss_20b(), 3)
    measured: dict[str, Callable[[], Any]] = {
        **{f"batch-{batch}": partial(decode, full, batch) for batch in ROUNDS},
        "prompt": lambda: prompt(full),
        "logits": lambda: logits(full),
        "texts": texts,
    }
    for part in chosen:
        click.echo(f"{time.strftime('%H:%M:%S')} {part}", err=True)
        found = measured[part]()
        how = f"python -m benchmarks.{NAME}: default backend and dtype. Weights are random but for the texts."
        before = load(NAME) or {}
        report = begin(how, work) | {name: before[name] for name in PARTS if name in before} | {part: found}
        publish(NAME, report, page(report))


if __name__ == "__main__":
    main()
