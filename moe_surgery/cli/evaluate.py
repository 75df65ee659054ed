"""moe-surgery evaluate."""

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
    plans_option,
    router_top_k,
    terminal_of,
)
from moe_surgery.cli.ray_options import Ray, ray_options
from moe_surgery.cli.text_options import TextArguments, text_options

if TYPE_CHECKING:
    from moe_surgery.cli.terminal import Terminal
    from moe_surgery.quality.evaluation import Evaluation, Quality


@click.command("evaluate")
@click.argument("ckpt")
@click.argument("pruned", nargs=-1)
@plans_option("evaluated without writing a checkpoint")
@router_top_k
@text_options
@click.option("--answers-only", is_flag=True, help="Count only the answers of conversations.")
@batch_tokens_option
@click.option("-o", "--output", type=OUTPUT, help="Write all figures here, for `report` and `card`.")
@compute_options
@ray_options
@common
@click.pass_context
def command(
    click_context: click.Context,
    ckpt: str,
    pruned: tuple[str, ...],
    plan_files: tuple[Path, ...],
    top_k: int | None,
    texts: TextArguments,
    answers_only: bool,
    batch_tokens: int | None,
    output: Path | None,
    compute: Compute,
    ray: Ray,
) -> None:
    """Measure how much quality plans and pruned checkpoints lose.

    CKPT is the full model, PRUNED are checkpoints pruned from it. The full model and all others go
    through the same texts layer by layer. Reports cross-entropy (nats per token) and perplexity, KL
    divergence from the full model, how often the most likely next token is the same (top-1), and the
    share of token-expert assignments that go to another expert (rerouted). Perplexity of a chat model on raw text
    means little: prefer conversations with --answers-only, and look at KL and top-1.

    --top-k applies to plans and pruned checkpoints, not to the full model. Without either, CKPT with
    that top-k is evaluated.

    \b
    moe-surgery evaluate example:tiny --plan code.json --texts notes.txt --texts code.py
    moe-surgery evaluate example:tiny --top-k 2 --texts notes.txt
    moe-surgery evaluate openai/gpt-oss-20b law-8/ --texts law.jsonl --answers-only -o law.evaluation.json
    moe-surgery evaluate openai/gpt-oss-20b variants/law-* --texts law.jsonl -o variants/law.evaluation.json --ray
    """
    needs_torch("evaluate")
    from moe_surgery.checkpoint.fileops import FileOps
    from moe_surgery.checkpoint.writer import write_file
    from moe_surgery.errors import UsageError
    from moe_surgery.quality.evaluate import BATCH_TOKENS, evaluate
    from moe_surgery.selection.plan import load_plan

    terminal = terminal_of(click_context)
    check_new_output(output, [*texts.paths, *plan_files])
    if not pruned and not plan_files and top_k is None:
        raise UsageError("nothing to compare with the full model; pass PRUNED checkpoints, --plan or --top-k")
    files = texts.files()
    plans = [(str(path), load_plan(path)) for path in plan_files]
    with ray.workers() as workers, terminal.job() as progress:
        evaluation = evaluate(
            ckpt,
            files,
            plans=plans,
            pruned=pruned,
            top_k=top_k,
            **texts.limits,
            answers_only=answers_only,
            batch_tokens=BATCH_TOKENS if batch_tokens is None else batch_tokens,
            **compute.arguments(),
            workers=workers,
            progress=progress,
        )
    if output is not None:
        write_file(output, evaluation.to_json().encode(), FileOps())
    if terminal.json:
        terminal.data(evaluation.as_dict())
    else:
        _print(terminal, evaluation)
    if output is not None:
        terminal.say(f"{output}: all figures; next: moe-surgery report STATS --evaluation {output}")


def _print(terminal: Terminal, evaluation: Evaluation) -> None:
    terminal.say(computed_by(evaluation.settings))
    columns = ["model", "experts", "tokens", "loss", "perplexity", "KL", "top-1", "rerouted"]
    sections = [(domain, domain) for domain in evaluation.domains]
    if len(sections) > 1:
        sections.append(("", "all domains"))
    for domain, title in sections:
        rows = []
        for model in evaluation.models:
            quality = model.domains[domain] if domain else model.overall
            low, high = min(model.experts), max(model.experts)
            experts = str(low) if low == high else f"{low} to {high}"
            rows.append([model.name, experts, *_figures(quality)])
        terminal.table(title, columns, rows)


def _figures(quality: Quality) -> list[str]:
    rerouted = quality.rerouted
    return [
        f"{quality.tokens:,}",
        f"{quality.cross_entropy:.3f}",
        f"{quality.perplexity:.4g}",
        f"{quality.kl:.4f}",
        f"{quality.agreement:.1%}",
        f"{sum(rerouted) / len(rerouted):.1%}" if rerouted else "?",
    ]
