"""Greedy speculation beside plain decoding on the native kernels, token for token: the full product.

    python -m benchmarks.exactness [--dtype bf16] [--kind view]

`speculation.py` does this in float32 on the reference backend and measures acceptance by domain; here it is
exactness alone, BF16 by default, where steps of one and of several tokens agree only in kernels made
so. 100 prompts of 32 tokens, 20 new ones, from docstrings of the running Python's library; drafts that keep
1, 4, 8, 16 and 31 random experts, as pruned checkpoints and as views, top-k 1, 2 and 4, lengths 1 to 8. All
prompts go through in one batch whose sequences accept different numbers; plain decoding takes one prompt at a
time. With one --kind the results are that kind's own, so that two can run side by side. They go to
benchmarks/results/.
"""

from __future__ import annotations

import random
import tempfile
import time
from importlib import import_module
from inspect import getdoc
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import click
import torch

from benchmarks.publish import begin, heading, publish
from moe_surgery import inspect, load_model, plan_random, prune
from moe_surgery.checkpoint.resolve import resolve
from moe_surgery.runtime.generate import generate
from moe_surgery.runtime.speculation.speculate import speculate
from moe_surgery.runtime.text import Text
from moe_surgery.runtime.view import view

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
EXPERTS, TOP_KS, LENGTHS, KINDS = (1, 4, 8, 16, 31), (1, 2, 4), tuple(range(1, 9)), ("checkpoint", "view")
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 100, 32, 20
MODULES = ("argparse", "decimal", "email.message", "fractions", "logging", "pathlib", "statistics", "tarfile")


def prompts_of(checkpoint: str) -> list[list[int]]:
    """The first tokens of docstrings, drawn with a fixed seed."""
    text, docs = Text(checkpoint), set()
    for module in map(import_module, MODULES):
        for thing in vars(module).values():
            docs |= {getdoc(thing), *map(getdoc, getattr(thing, "__dict__", {}).values())}
    tokens = [text.encode(doc)[:PROMPT_TOKENS] for doc in sorted(filter(None, docs))]
    return random.Random(0).sample([t for t in tokens if len(t) == PROMPT_TOKENS], PROMPTS)


@click.command(help=__doc__)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bf16", show_default=True)
@click.option(
    "--kind", "kinds", type=click.Choice(KINDS), multiple=True, default=KINDS, help="Default: both."
)
def main(dtype: str, kinds: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    checkpoint = str(resolve("example:tiny"))
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "backend": "native"}
    target, described = load_model(checkpoint, **options), inspect(checkpoint)
    prompts, began = prompts_of(checkpoint), time.perf_counter()
    rows: list[dict[str, Any]] = []
    plain = [generate(target, [p], max_new_tokens=NEW_TOKENS, stop_tokens=()).tokens[0] for p in prompts]
    with tempfile.TemporaryDirectory() as folder:
        for kind, kept in product(kinds, EXPERTS):
            plan = plan_random(kept, 0, described)
            if kind == "checkpoint":
                prune(checkpoint, Path(folder) / str(kept), plan)
                draft = load_model(Path(folder) / str(kept), **options)
            else:
                draft = view(target, plan)
            for top_k, length in product(TOP_KS, LENGTHS):
                result = speculate(
                    target,
                    view(draft, None, top_k),
                    prompts,
                    draft_length=length,
                    max_new_tokens=NEW_TOKENS,
                    stop_tokens=(),
                )
                wrong = sum(a != b for a, b in zip(result.tokens, plain, strict=True))
                row = {"kind": kind, "experts": kept, "top_k": top_k, "length": length}
                rows.append({**row, "differing": wrong, "acceptance": result.statistics.acceptance})
            wrong = sum(r["differing"] for r in rows)
            click.echo(f"{time.perf_counter() - began:.0f} s: {kind}, {kept} experts, {wrong} differ so far")
    report = {
        **begin(
            f"python -m benchmarks.exactness --dtype {dtype}: greedy, native backend "
            "(MXFP4 products with activations of 16 bits), one thread, "
            f"{PROMPTS} prompts of {PROMPT_TOKENS} tokens, {NEW_TOKENS} new ones, {' and '.join(kinds)} drafts of "
            "random experts."
        ),
        "outputs": len(rows) * PROMPTS,
        "differing": sum(r["differing"] for r in rows),
        "rows": by_draft(rows),
    }
    publish("_".join(["exactness", dtype, *(kinds if len(kinds) == 1 else ())]), report, page(report))


def by_draft(runs: list[dict]) -> list[dict]:
    """Outputs, those that differ, and the mean acceptance, for each kind and size of draft."""
    return [
        {
            "kind": kind,
            "experts": kept,
            "outputs": len(chosen) * PROMPTS,
            "differing": sum(r["differing"] for r in chosen),
            "acceptance": mean(r["acceptance"] for r in chosen),
        }
        for kind, kept in dict.fromkeys((r["kind"], r["experts"]) for r in runs)
        if (chosen := [r for r in runs if (r["kind"], r["experts"]) == (kind, kept)])
    ]


def page(report: dict) -> list[str]:
    lines = heading("Greedy speculation beside plain decoding", report)
    return [*lines, "", f"{report['differing']} of {report['outputs']} outputs differ from plain decoding."]


if __name__ == "__main__":
    main()
