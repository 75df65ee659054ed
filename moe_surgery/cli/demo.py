"""moe-surgery demo."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe_surgery.cli.options import OUTPUT, common, terminal_of
from moe_surgery.cli.terminal import Terminal, size

if TYPE_CHECKING:
    from moe_surgery.demo import DemoResult

LONGEST_REPLY = 24


@click.command("demo")
@click.option(
    "--output",
    type=OUTPUT,
    help="Write the pruned models, their statistics and a report page to this new folder; default: discard them.",
)
@click.option(
    "--questions", type=click.IntRange(1), default=50, show_default=True, help="Questions of each domain."
)
@common
@click.pass_context
def command(context: click.Context, output: Path | None, questions: int) -> None:
    """Prune the bundled model for each of its domains and compare answers.

    The model (32 experts in each of 4 layers) answers questions of five domains: sums, words spelled backwards,
    Python expressions, numbers in words, and facts about invented countries. The demo profiles it on texts of each
    domain, prunes it to the 8 experts that this domain uses most, verifies the result, and prints the share of
    held-out questions that each model answers correctly: the full one, one per domain, and one with 8 random experts.
    Two more have the 3 best experts for numbers in words, as pruned and repaired. Takes about a minute.

    \b
    moe-surgery demo
    moe-surgery demo --output tiny-models
    """
    from moe_surgery.demo import run_demo

    terminal = terminal_of(context)
    show(terminal, run_demo(output, terminal.say, questions=questions))


def show(terminal: Terminal, result: DemoResult) -> None:
    """Print the table and the examples, or all as JSON."""
    from moe_surgery.demo import SOURCE

    rows = result.rows
    if terminal.json:
        report = None if result.report is None else str(result.report)
        terminal.data(
            {
                "models": [asdict(row) for row in rows],
                "examples": [asdict(example) for example in result.examples],
                "report": report,
            }
        )
        return
    domains = list(rows[0].accuracy)
    terminal.table(
        f"{SOURCE}, full and pruned to fewer experts a layer; held-out questions answered correctly",
        ["model", "experts", "bytes", "share", "verified", "tokens/s", *domains],
        [
            [
                row.name,
                str(row.experts),
                size(row.nbytes),
                f"{row.nbytes / rows[0].nbytes:.0%}",
                "yes" if row.verified else "NO",
                "" if row.tokens_per_second is None else f"{row.tokens_per_second:.0f}",
                *(f"{row.accuracy[domain]:.0%}" for domain in domains),
            ]
            for row in rows
        ],
    )
    for example in result.examples:
        replies = ", ".join(f"{name}: {_short(reply)}" for name, reply in example.replies.items())
        terminal.result(f"{example.question} -> {replies}")
    if result.report is not None:
        terminal.say(f"{result.report}: which experts each domain uses; open it in a browser")
        terminal.say(
            f"{result.report.parent}: the pruned models; "
            f"try moe-surgery inspect {result.report.parent / rows[1].name}"
        )


def _short(reply: str) -> str:
    return (reply if len(reply) <= LONGEST_REPLY else f"{reply[:LONGEST_REPLY]}...") or "(nothing)"
