"""profile of a Qwen3-MoE of 20 GB (128 experts in 48 layers) inside a memory cgroup, beside what it must cost.

    python -m benchmarks.any_family_budget --work FOLDER [--tokens 4096] [--limit 3221225472] [--layers 48]

FOLDER/qwen3-48 is made (21 GB, random BF16 weights) where it is not there. It runs on transformers' modules in BF16.
The bound is the larger of two times: all weights but the unembedding read once at the rate at which the checkpoint's
files are read here, and the products' operations at the rate of a large BF16 product of torch here, both measured
in this run.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import click

from benchmarks.make_per_expert import HEAD_DIM, VOCABULARY, make_checkpoint
from benchmarks.make_tokenizer import make_tokenizer
from benchmarks.profile_budget import product_rate, read_rate, run
from benchmarks.publish import begin, heading, publish, table
from moe_surgery import inspect

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 48, 128, 2048, 256, 8


def operations(tokens: int) -> float:
    """Multiplications and additions of all products but attention's scores and the unembedding."""
    return 2.0 * tokens * LAYERS * HIDDEN * (4 * HIDDEN + TOP_K * 3 * INTERMEDIATE + EXPERTS)


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--tokens", default=4096, show_default=True)
@click.option("--limit", default=3 << 30, show_default=True, help="Bytes of memory allowed.")
@click.option("--layers", default=LAYERS, show_default=True, help="Fewer where the disk is small.")
@click.option("--no-publish", is_flag=True, help="Print the figures only.")
def main(work: Path, tokens: int, limit: int, layers: int, no_publish: bool) -> None:
    full, text = work / f"qwen3-{layers}", work / "profile.txt"
    if not full.exists():
        make_checkpoint(
            full, layers=layers, experts=EXPERTS, hidden=HIDDEN, intermediate=INTERMEDIATE, runnable=True
        )
        make_tokenizer(full, VOCABULARY)
    library = Path(sysconfig.get_paths()["stdlib"])
    text.write_text("".join(f.read_text() for f in sorted(library.glob("a*.py"))))
    weights = inspect(full)
    read = weights.nbytes - weights.parts["embedding and unembedding"]
    rates = {"read": read_rate(max(full.glob("*.safetensors"))), "products": product_rate(HIDDEN)}
    result = run(
        "profile",
        full,
        text,
        tokens,
        work / "profile.stats",
        limit,
        "--batch-tokens",
        str(tokens),
        "--dtype",
        "bf16",
    )
    total = operations(tokens) * layers / LAYERS
    bound = max(read / rates["read"], total / rates["products"])
    report = {
        **begin(
            f"python -m benchmarks.any_family_budget --tokens {tokens} --layers {layers} --limit {limit}: "
            f"profile of a Qwen3-MoE ({EXPERTS} experts in "
            f"{layers} layers, hidden size {HIDDEN}, heads of {HEAD_DIM}) in a memory cgroup of "
            f"{limit / (1 << 30):.2f} GiB, bfloat16, on transformers.",
            work,
        ),
        "figures": {
            **result,
            "bytes_read_gb": read / 1e9,
            "read_gb_per_second": rates["read"] / 1e9,
            "teraoperations": total / 1e12,
            "gigaoperations_per_second": rates["products"] / 1e9,
            "bound_seconds": bound,
            "times_the_bound": result["seconds"] / bound,
        },
    }
    rows = [(name, f"{value:.4g}") for name, value in report["figures"].items()]
    lines = [
        *heading("profile of a Qwen3-MoE larger than memory", report),
        "",
        *table(("figure", "value"), rows),
    ]
    if no_publish:
        click.echo("\n".join(lines))
    else:
        publish("any_family_budget", report, lines)


if __name__ == "__main__":
    main()
