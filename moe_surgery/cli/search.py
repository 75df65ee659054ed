"""moe-surgery search."""

from __future__ import annotations

from pathlib import Path

import click

from moe_surgery.cli.options import (
    OUTPUT,
    Compute,
    check_new_output,
    common,
    compute_options,
    computed_by,
    needs_torch,
    terminal_of,
)
from moe_surgery.cli.text_options import TextArguments, text_options


@click.command("search")
@click.argument("ckpt")
@text_options
@click.option("-o", "--output", type=OUTPUT, required=True, help="Write the ranking here.")
@compute_options
@common
@click.pass_context
def command(
    click_context: click.Context,
    ckpt: str,
    texts: TextArguments,
    output: Path,
    compute: Compute,
) -> None:
    """Rank experts by greedy elimination.

    Metrics score experts one by one. `search` looks for the n that together reproduce each
    layer's output best: it drops experts one at a time, always the one whose loss changes the layer's
    output least, and routes its tokens to those that remain. The ranking serves every size: `plan` keeps
    its first N. Whether it preserves more than a metric depends on the model: compare plans of both with
    `evaluate`. It costs more: every token goes through every expert, 8 times the expert work of `profile`
    for 32 experts with top-4.

    \b
    moe-surgery search example:tiny --texts notes.txt --max-tokens 200 -o tiny-ranking.json
    moe-surgery search openai/gpt-oss-20b --texts law.jsonl --max-tokens 4096 -o law.json

    Stop it at any time; the same command resumes after the last finished layer.
    """
    needs_torch("search")
    from moe_surgery.quality.search import search

    terminal = terminal_of(click_context)
    check_new_output(output, texts.paths)
    files = texts.files()
    terminal.after_interrupt = "; the same command resumes after the last finished layer"
    with terminal.job() as progress:
        ranking = search(
            ckpt,
            files,
            output,
            **texts.limits,
            **compute.arguments(),
            progress=progress,
        )
    errors, settings = ranking.provenance["errors"], ranking.provenance["settings"]
    assert isinstance(errors, list)
    assert isinstance(settings, dict)
    if terminal.json:
        terminal.data({"output": str(output), "layers": ranking.layers, "provenance": ranking.provenance})
        return
    terminal.say(computed_by(settings))
    counts = [n for n in (1, 2, 4, 8, 12, 16, 24, 48, 64, 96) if n < ranking.num_experts]
    counts = [n for n in counts if errors[0][n - 1] is not None]  # the router can choose from so few
    means = [sum(row[n - 1] for row in errors) / len(errors) for n in counts]
    worst = [max(row[n - 1] for row in errors) for n in counts]
    terminal.table(
        "squared error of a layer's output, relative to the hidden state after it",
        ["experts kept", *map(str, counts)],
        [["mean over layers", *(f"{e:.2g}" for e in means)], ["worst layer", *(f"{e:.2g}" for e in worst)]],
    )
    terminal.say(f"{output}: ranking; next: moe-surgery plan {output} --experts N -o plan.json")
