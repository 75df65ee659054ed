"""moe-surgery demo."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from moe_surgery.cli.options import OUTPUT, common, terminal_of
from moe_surgery.cli.terminal import count, size


@click.command("demo")
@click.option("--output", type=OUTPUT, help="Keep the pruned models in this new folder.")
@common
@click.pass_context
def command(context: click.Context, output: Path | None) -> None:
    """Run the main job on the embedded tiny model and show the result in one table.

    Profiles example:tiny on arithmetic and code, plans, prunes and verifies several sizes, in MXFP4
    and BF16, then generates with each and measures its loss on three short texts: the first two are of
    the kinds it was profiled on. One model has random experts, to compare. Takes some ten seconds.

    \b
    moe-surgery demo
    moe-surgery demo --output tiny-models
    """
    from moe_surgery.demo import PROMPT, SOURCE, run_demo

    terminal = terminal_of(context)
    rows = run_demo(output, terminal.say)
    if terminal.json:
        terminal.data([asdict(row) for row in rows])
        return
    texts = list(rows[0].losses)
    terminal.table(
        f"{rows[0].name} {SOURCE} and what is left of it; loss in nats a token",
        ["model", "experts", "top-k", "parameters", "bytes", "of full", "verified", "tokens/s", *texts],
        [
            [
                row.name,
                str(row.experts),
                str(row.top_k),
                count(row.parameters),
                size(row.nbytes),
                f"{row.nbytes / rows[0].nbytes:.0%}",
                "yes" if row.verified else "NO",
                "" if row.tokens_per_second is None else f"{row.tokens_per_second:.0f}",
                *(f"{row.losses[text]:.2f}" for text in texts),
            ]
            for row in rows
        ],
    )
    for row in rows:
        if row.sample is not None:
            terminal.result(f"{row.name:<13} {PROMPT.splitlines()[0]} -> {row.sample}")
    if output is not None:
        terminal.say(f"{output}: the pruned models; try moe-surgery inspect {output / rows[1].name}")
