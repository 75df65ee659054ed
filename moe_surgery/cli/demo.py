"""moe-surgery demo."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from moe_surgery.cli.options import OUTPUT, common, terminal_of
from moe_surgery.cli.terminal import count, size


@click.command("demo")
@click.option(
    "--output", type=OUTPUT, help="Write the pruned models to this new folder; default: discard them."
)
@common
@click.pass_context
def command(context: click.Context, output: Path | None) -> None:
    """Prune the bundled model and compare results.

    Profiles example:tiny on arithmetic and code, then plans, prunes and verifies several sizes in MXFP4
    and BF16, one of them with random experts. Generates with each and measures its loss on three short
    texts; the first two resemble the texts it was profiled on. Takes about ten seconds.

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
        f"{SOURCE}, full and pruned; loss in nats per token",
        ["model", "experts", "top-k", "parameters", "bytes", "share", "verified", "tokens/s", *texts],
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
