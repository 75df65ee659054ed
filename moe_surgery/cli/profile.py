"""moe-surgery profile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe_surgery.cli.options import (
    OUTPUT,
    Compute,
    batch_tokens_option,
    check_new_output,
    common,
    compute_options,
    computed_by,
    needs_torch,
    terminal_of,
)
from moe_surgery.cli.ray_options import Ray, ray_options
from moe_surgery.cli.terminal import Terminal
from moe_surgery.cli.text_options import TextArguments, generate_option, text_options

if TYPE_CHECKING:
    from moe_surgery.quality.job import ProfileResult


@click.command("profile")
@click.argument("ckpt")
@text_options
@click.option("-o", "--output", type=OUTPUT, required=True, help="Write the statistics here.")
@batch_tokens_option
@generate_option("the model answers each conversation, and the answers are profiled too")
@click.option(
    "--sequential",
    metavar="PLAN",
    type=click.Path(path_type=Path),
    help="Plan file; feed each layer the output of earlier layers pruned by it.",
)
@compute_options
@ray_options
@common
@click.pass_context
def command(
    click_context: click.Context,
    ckpt: str,
    texts: TextArguments,
    output: Path,
    batch_tokens: int | None,
    generate: int | None,
    sequential: Path | None,
    compute: Compute,
    ray: Ray,
) -> None:
    """Run texts through a model and record what each expert does.

    All tokens of a batch go through layer 0, then its weights are released and layer 1 is mapped: memory
    holds one layer, however large the model is. The statistics (how often an expert is chosen, its
    routing weights, the norms of its outputs) are kept per domain; any metric can rank them later
    without another run. Texts like those the model will serve, in its chat format, work best: pass
    conversations, or have it answer your prompts with --generate.

    \b
    moe-surgery profile example:tiny --texts notes.txt --texts code.py -o tiny.stats
    moe-surgery profile openai/gpt-oss-20b --texts law.jsonl --domain law -o law.stats
    moe-surgery profile openai/gpt-oss-20b --texts questions.jsonl --generate 256 -o answers.stats
    moe-surgery profile openai/gpt-oss-20b --texts law.jsonl -o law.stats --ray

    Stop it at any time; the same command resumes after the last finished batch.
    """
    needs_torch("profile")
    from moe_surgery.quality.job import BATCH_TOKENS, profile
    from moe_surgery.selection.plan import load_plan

    terminal = terminal_of(click_context)
    check_new_output(output, [*texts.paths, sequential])
    files = texts.files()
    plan = None if sequential is None else load_plan(sequential)
    terminal.after_interrupt = "; the same command resumes after the last finished batch"
    with ray.workers() as workers, terminal.job() as progress:
        profiled = profile(
            ckpt,
            files,
            output,
            **texts.limits,
            batch_tokens=BATCH_TOKENS if batch_tokens is None else batch_tokens,
            generate=generate,
            sequential=plan,
            **compute.arguments(),
            workers=workers,
            progress=progress,
        )
    _print(terminal, profiled)


def _print(terminal: Terminal, profiled: ProfileResult) -> None:
    statistics = profiled.statistics
    if terminal.json:
        terminal.data(
            {
                "output": str(profiled.output),
                "checkpoint": statistics.identity,
                "tokens": statistics.tokens,
                "resumed_tokens": profiled.resumed_tokens,
                "texts": statistics.texts,
                "settings": statistics.settings,
            }
        )
        return
    if profiled.resumed_tokens:
        terminal.say(f"resumed after {profiled.resumed_tokens:,} tokens of an interrupted run")
    terminal.say(computed_by(statistics.settings))
    for domain in statistics.domains:
        never = sum(int((layer.count == 0).sum()) for layer in statistics.data[domain])
        unused = f"; {never} of its experts were never chosen" if never else ""
        terminal.result(f"{domain}: {statistics.tokens[domain]:,} tokens{unused}")
    terminal.say(
        f"{profiled.output}: {statistics.layers} layers of {statistics.experts} experts; "
        f"next: moe-surgery plan {profiled.output} --metric reap --experts N -o plan.json"
    )
