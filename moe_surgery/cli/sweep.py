"""moe-surgery sweep."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe_surgery.cli.keep import order_option
from moe_surgery.cli.options import (
    EXPERT_COUNTS,
    OUTPUT,
    SIZE,
    base_model_option,
    common,
    terminal_of,
    write_options,
)
from moe_surgery.cli.ray_options import Ray, ray_options
from moe_surgery.cli.terminal import Terminal, size
from moe_surgery.formats.expert_format import EXPERT_DTYPES

if TYPE_CHECKING:
    from moe_surgery.pipeline.sweep.run import SweepResult


@click.command("sweep")
@click.argument("ckpt")
@click.argument("outdir", type=OUTPUT)
@click.option(
    "--ranking",
    "rankings",
    metavar="[NAME=]FILE",
    type=click.Path(),
    multiple=True,
    required=True,
    help="Ranking file or published:NAME, with the name that its variants get; default: the file's; repeat for more.",
)
@click.option(
    "--experts",
    "-n",
    type=EXPERT_COUNTS,
    required=True,
    help="Number of experts to keep in each layer: a list such as 4,8,16 or 4-32.",
)
@order_option
@click.option(
    "--store",
    type=click.Choice(EXPERT_DTYPES),
    default="keep",
    show_default=True,
    help="Format of expert weights in the output; mxfp4 is lossless for weights that came from MXFP4.",
)
@click.option(
    "--max-shard-size",
    type=SIZE,
    help="Maximum tensor bytes per file; default: 5GB.",
)
@click.option(
    "--share/--no-share",
    default=True,
    show_default=True,
    help="Store tensors that do not count experts once for all variants, as reflinks or read-only hard links.",
)
@click.option(
    "--evaluation",
    "evaluations",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Evaluation file to show; repeat for more; default: those in OUTDIR.",
)
@write_options
@click.option(
    "--mtp",
    type=click.Choice(["keep", "drop"]),
    help="Layers for multi-token prediction: cut to as many experts as the others (keep), or left out (drop); "
    "default: keep.",
)
@base_model_option
@ray_options
@common
@click.pass_context
def command(
    context: click.Context,
    ckpt: str,
    outdir: Path,
    rankings: tuple[str, ...],
    experts: list[int],
    order: str,
    store: str,
    max_shard_size: int | None,
    share: bool,
    evaluations: tuple[Path, ...],
    dry_run: bool,
    ignore_free_space: bool,
    ignore_unlisted: bool,
    mtp: str | None,
    base_model: str | None,
    ray: Ray,
) -> None:
    """Prune by every ranking to every number of experts.

    CKPT cut by the ranking law.json to 8 experts becomes the checkpoint OUTDIR/law-8, with a model card, and is
    verified. Tensors that do not count experts (attention, embedding, norms) are the same in all variants: they are
    written once and shared. Their files are read-only where the file system has no reflinks: another program that
    overwrites one in place would change all variants. moe-surgery itself always replaces files.

    OUTDIR/index.html lists all variants with their sizes, and with quality where OUTDIR holds a file that
    `evaluate -o` wrote; index.md and index.json have the same. --dry-run shows what the sweep will take. Stop it at any
    time; the same command makes and verifies what is missing, and nothing twice.

    \b
    moe-surgery sweep example:tiny tiny-sweep --ranking code=code-ranking.json --experts 4,8 --dry-run
    moe-surgery sweep example:tiny tiny-sweep --ranking code-ranking.json --ranking all=tiny-ranking.json --experts 6-8
    moe-surgery sweep openai/gpt-oss-20b variants --ranking published:law --ranking published:math --experts 4-32
    moe-surgery sweep openai/gpt-oss-20b variants --ranking published:law --experts 4-32 --ray
    moe-surgery evaluate openai/gpt-oss-20b variants/law-* --texts law.jsonl -o variants/evaluation.json
    """
    from moe_surgery.pipeline.sweep.run import sweep

    terminal = terminal_of(context)
    start = time.perf_counter()
    if not dry_run:
        terminal.after_interrupt = "; the same command continues where it stopped"
    with ray.workers() as workers, terminal.job() as progress:
        result = sweep(
            ckpt,
            outdir,
            [_named(ranking) for ranking in rankings],
            experts,
            store=store,
            order=order,
            max_shard_size=max_shard_size,
            mtp=mtp,
            base_model=base_model,
            share=share,
            evaluations=evaluations,
            dry_run=dry_run,
            ignore_free_space=ignore_free_space,
            ignore_unlisted=ignore_unlisted,
            on_costs=None if dry_run else lambda planned: _print_costs(terminal, planned),
            workers=workers,
            progress=progress,
        )
    if terminal.json:
        terminal.data(_as_dict(result, time.perf_counter() - start))
    elif dry_run:
        _print_costs(terminal, result)
    else:
        _print(terminal, result, time.perf_counter() - start)
        terminal.unfinished(result.stale)


def _named(ranking: str) -> tuple[str, str] | str:
    """NAME=FILE, unless that is the name of a file."""
    name, given, file = ranking.partition("=")
    return (name, file) if given and not os.path.lexists(ranking) else ranking


def _print_costs(terminal: Terminal, result: SweepResult) -> None:
    """What the sweep takes, a line for each number of experts."""
    if terminal.json:
        return
    costs = result.costs
    rows = []
    for experts, cost in costs.by_count.items():
        number = sum(v.experts == experts for v in result.variants)
        own = cost.nbytes - (cost.dense_nbytes if costs.shared else 0)
        rows.append([str(experts), str(number), size(cost.nbytes), size(own), size(number * own)])
    columns = ["experts", "variants", "size of each", "of that not shared", "together"]
    terminal.table(f"{result.out}: {costs.variants} variants", columns, rows)
    terminal.result(
        f"{costs.variants} variants of {size(costs.nbytes)} together, of which {size(costs.shared)} are shared; "
        f"{costs.finished} are there; to write: {size(costs.needed)}; free: {size(costs.free)}"
    )


def _print(terminal: Terminal, result: SweepResult, seconds: float) -> None:
    names = {v.name for v in result.variants}
    evaluated = sum(bool(e.figures) for e in result.entries if e.name in names)
    terminal.result(
        f"{result.out}: {len(names)} variants, {len(result.made)} made and {len(result.verified)} verified now, "
        f"{evaluated} evaluated; {seconds:.1f} s"
    )
    terminal.say(f"{result.out / 'index.html'}: all {len(result.entries)} variants of this folder")


def _as_dict(result: SweepResult, seconds: float) -> dict[str, object]:
    from dataclasses import asdict

    costs = result.costs
    return {
        "output": str(result.out),
        "seconds": seconds,
        "bytes": costs.nbytes,
        "bytes_shared": costs.shared,
        "bytes_needed": costs.needed,
        "bytes_free": costs.free,
        "already_there": costs.finished,
        "made": list(result.made),
        "verified": list(result.verified),
        "variants": [{"name": v.name, "ranking": v.ranking, "experts": v.experts} for v in result.variants],
        "index": [asdict(entry) for entry in result.entries],
        "stale_partial_folders": [str(p) for p in result.stale],
    }
