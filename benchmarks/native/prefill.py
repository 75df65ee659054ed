"""Reading prompts by instruction set, alternately in one run; to benchmarks/results/native_prefill.{json,md}.

    python -m benchmarks.make_checkpoint FOLDER --layers 3 --vocabulary 40000
    python -m benchmarks.native.prefill FOLDER [--tokens 512 --tokens 2048] [--rounds 5]

Tokens per second are of the best round, since others may use the machine; CPU seconds of all threads are given beside
them. Ratios are to avx512vnni, or the best set without tiles: what prompts were read with before there were tiles.
With few layers the output projection weighs more than in a whole model: it is computed for the last token only.
"""

from __future__ import annotations

import os
import time

import click
import torch

from benchmarks.publish import begin, heading, publish, table
from moe_surgery.kernels.native import NativeBackend
from moe_surgery.runtime.load import load_model
from moe_surgery.runtime.model import CausalLM


def models_of(path: str) -> dict[str, CausalLM]:
    """One for each set with tiles, and for the best without; they share the mapped weights."""
    every = NativeBackend.instruction_sets()
    sets = [isa for isa in every if NativeBackend(isa).has_tiles]
    sets.append(next(isa for isa in every if isa not in sets))
    models = {}
    for isa in sets:
        models[isa] = load_model(path, backend="native")
        models[isa].backend = NativeBackend(isa)
    return models


def measure(models: dict[str, CausalLM], tokens: int, rounds: int) -> list[dict[str, object]]:
    best = {isa: [float("inf")] * 2 for isa in models}
    vocabulary = next(iter(models.values())).config.vocab_size
    ids = torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    for round_ in range(rounds + 1):
        for isa, model in models.items():
            start, used = time.perf_counter(), time.process_time()
            model(ids, logits_to_keep=1)
            taken = time.perf_counter() - start, time.process_time() - used
            if round_:  # the first reads the weights
                best[isa] = [min(pair) for pair in zip(best[isa], taken, strict=True)]
    before = best[list(models)[-1]]
    return [
        {
            "instruction set": isa,
            "tokens": tokens,
            "tokens/s": tokens / clock,
            "ratio": before[0] / clock,
            "tokens per CPU second": tokens / cpu,
            "CPU ratio": before[1] / cpu,
        }
        for isa, (clock, cpu) in best.items()
    ]


@click.command(help=__doc__)
@click.argument("checkpoint")
@click.option("--tokens", default=[512, 2048], multiple=True, show_default=True)
@click.option("--rounds", default=5, show_default=True)
def main(checkpoint: str, tokens: tuple[int, ...], rounds: int) -> None:
    models = models_of(checkpoint)
    config = next(iter(models.values())).config
    report = begin(
        f"python -m benchmarks.native.prefill FOLDER --rounds {rounds}: a checkpoint of gpt-oss-20b's width with "
        f"{config.num_hidden_layers} layers and a vocabulary of {config.vocab_size}, {os.cpu_count()} threads, batch 1."
    )
    report["rows"] = [row for count in tokens for row in measure(models, count, rounds)]
    report["machine"]["load average at the end"] = round(os.getloadavg()[0], 2)
    publish("native_prefill", report, page(report))


def page(report: dict) -> list[str]:
    rows = [[f"{v:.2f}" if isinstance(v, float) else v for v in row.values()] for row in report["rows"]]
    lines = heading("Reading prompts on the CPU", report)
    return [*lines, "", *table(list(report["rows"][0]), rows)]


if __name__ == "__main__":
    main()
