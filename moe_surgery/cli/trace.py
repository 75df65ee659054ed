"""moe-surgery trace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe_surgery.cli.options import (
    OUTPUT,
    Compute,
    check_new_output,
    common,
    compute_options,
    computed_by,
    needs_torch,
    plans_option,
    terminal_of,
)
from moe_surgery.cli.terminal import size
from moe_surgery.cli.text_options import generate_option, prompt_options, read_stdin

if TYPE_CHECKING:
    from moe_surgery.cli.terminal import Terminal
    from moe_surgery.quality.routing_trace import Trace


@click.command("trace")
@click.argument("ckpt")
@prompt_options
@generate_option("the full model continues the prompt, and its tokens are traced too")
@plans_option("shows what the model loses with it")
@click.option("-o", "--output", type=OUTPUT, help="Write the HTML page here.")
@click.option("--title", help="Heading of the page.")
@compute_options
@common
@click.pass_context
def command(
    click_context: click.Context,
    ckpt: str,
    prompt: str | None,
    chat: str | None,
    generate: int | None,
    plan_files: tuple[Path, ...],
    output: Path | None,
    title: str | None,
    compute: Compute,
) -> None:
    """Show which experts each token of a text is routed to.

    The text goes through the model one layer at a time. The page shows it coloured by expert: pick a layer and an
    expert to see where it fires, or one token to see its experts and their weights in every layer.

    With --plan the same tokens also go through the model restricted to the plan's experts. The page then shows
    which tokens lose experts, and how far the next token's distribution moves there: KL(full || plan) in nats.
    To compare two domains, pass a plan made for each.

    --json prints all of it: expert ids and routing weights per layer, token and slot, and for each model the loss,
    KL divergence and most likely next token. The page is self-contained and loads nothing from the network.

    \b
    moe-surgery trace example:tiny --prompt "12 + 30 = 42" -o trace.html
    moe-surgery trace example:tiny --chat "What is 2 + 2?" --generate 16 --json
    moe-surgery trace openai/gpt-oss-20b --chat "May a tenant sublet?" --plan law-8.json --plan code-8.json -o law.html
    moe-surgery trace openai/gpt-oss-20b -o essay.html < essay.txt
    """
    needs_torch("trace")
    from moe_surgery.checkpoint.fileops import FileOps
    from moe_surgery.checkpoint.writer import write_file
    from moe_surgery.errors import UsageError
    from moe_surgery.quality.trace import trace
    from moe_surgery.report.trace_page import build_trace_page
    from moe_surgery.selection.plan import load_plan

    terminal = terminal_of(click_context)
    if output is None and not terminal.json:
        raise UsageError("nothing to write; pass -o FILE for the page, or --json")
    if prompt is not None and chat is not None:
        raise UsageError("choose one of --prompt and --chat")
    check_new_output(output, plan_files)
    plans = [(path.name, load_plan(path)) for path in plan_files]
    if prompt is None and chat is None:
        prompt = read_stdin()
        if not prompt:
            raise UsageError("the prompt is empty; pass --prompt TEXT, --chat TEXT, or text on stdin")
    with terminal.job() as progress:
        traced = trace(
            ckpt,
            prompt,
            chat=chat,
            generate=generate,
            plans=plans,
            **compute.arguments(),
            progress=progress,
        )
    terminal.say(computed_by(traced.settings))
    if output is not None:
        page = build_trace_page(traced, title).encode()
        write_file(output, page, FileOps())
        terminal.say(f"{output}: {size(len(page))}, {len(traced.tokens):,} tokens, {traced.layers} layers")
    if terminal.json:
        terminal.result(traced.to_json())
    else:
        _print(terminal, traced)


def _print(terminal: Terminal, traced: Trace) -> None:
    for model in traced.models[1:]:
        most = int(model.kl.argmax())
        terminal.result(
            f"{model.name}: KL {model.kl.mean():.4f} nats per token, most {model.kl[most]:.4f} at token {most} "
            f"{traced.texts[most]!r}"
        )
