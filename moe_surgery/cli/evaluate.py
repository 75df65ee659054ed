"""moe-surgery evaluate."""

from __future__ import annotations

from functools import partial
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
    from moe_surgery.quality.evaluation import Evaluation, ModelResult, Quality


@click.command("evaluate")
@click.argument("ckpt")
@click.argument("pruned", nargs=-1)
@plans_option("evaluated without writing a checkpoint")
@router_top_k
@partial(text_options, absent="the full model's replies to --answers")
@click.option(
    "--answers",
    metavar="FILE",
    multiple=True,
    help="Questions with their answers, in .jsonl or .json, or example:DOMAIN; repeat for more.",
)
@click.option(
    "--max-new-tokens",
    type=int,
    help="Maximum tokens to generate: for each reply to --answers; default: 256.",
)
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
    answers: tuple[str, ...],
    max_new_tokens: int | None,
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

    With --answers all models also answer questions (rows {"prompt": "...", "answer": "..."}; see
    docs/choosing-experts.md), and the share of right answers is printed with its 95% interval (Wilson), the
    questions that only the full model (lost) or only the other (gained) answers right, and how likely such a
    difference is by chance (p, McNemar's exact test). With -o replies are kept in OUTPUT.replies.jsonl, from which
    the same command resumes; further plans cost only their own replies.

    --top-k applies to plans and pruned checkpoints, not to the full model. Without either, CKPT with
    that top-k is evaluated.

    \b
    moe-surgery evaluate example:tiny --plan code.json --texts notes.txt --texts code.py
    moe-surgery evaluate example:tiny --top-k 2 --texts notes.txt
    moe-surgery evaluate example:tiny --plan code.json --answers example:python --max-new-tokens 24
    moe-surgery evaluate openai/gpt-oss-20b law-8/ --texts law.jsonl --answers-only -o law.evaluation.json
    moe-surgery evaluate openai/gpt-oss-20b variants/law-* --texts law.jsonl -o variants/law.evaluation.json --ray
    """
    needs_torch("evaluate")
    from moe_surgery.checkpoint.fileops import FileOps
    from moe_surgery.checkpoint.writer import write_file
    from moe_surgery.errors import UsageError
    from moe_surgery.quality.ask import MAX_NEW_TOKENS
    from moe_surgery.quality.evaluate import BATCH_TOKENS, evaluate
    from moe_surgery.selection.plan import load_plan

    terminal = terminal_of(click_context)
    check_new_output(output, [*texts.paths, *map(Path, answers), *plan_files])
    if not pruned and not plan_files and top_k is None:
        raise UsageError("nothing to compare with the full model; pass PRUNED checkpoints, --plan or --top-k")
    if max_new_tokens is not None and not answers:
        raise UsageError("--max-new-tokens needs --answers")
    files = texts.files() or None
    plans = [(str(path), load_plan(path)) for path in plan_files]
    with ray.workers() as workers, terminal.job() as progress:
        evaluation = evaluate(
            ckpt,
            files,
            plans=plans,
            pruned=pruned,
            top_k=top_k,
            **texts.limits,
            answers=answers,
            max_new_tokens=MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens,
            replies=None if output is None else output.with_name(f"{output.name}.replies.jsonl"),
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
            rows.append([model.name, _experts(model), *_figures(quality)])
        terminal.table(title, columns, rows)
    if evaluation.questions:
        _print_answers(terminal, evaluation)


def _print_answers(terminal: Terminal, evaluation: Evaluation) -> None:
    columns = ["model", "experts", "questions", "right", "95% interval", "lost", "gained", "p", "KL"]
    domains = sorted(evaluation.models[0].accuracy)
    sections = [(domain, f"{domain}: answers") for domain in domains]
    if len(sections) > 1:
        sections.append(("", "all domains: answers"))
    for domain, title in sections:
        rows = []
        for model in evaluation.models:
            accuracy = model.accuracy[domain] if domain else model.overall_accuracy
            quality = model.domains.get(domain, model.overall)
            low, high = accuracy.interval
            rows.append(
                [
                    model.name,
                    _experts(model),
                    f"{accuracy.questions:,}",
                    f"{accuracy.share:.1%}",
                    f"{low:.1%} to {high:.1%}",
                    f"{len(accuracy.lost)}",
                    f"{len(accuracy.gained)}",
                    f"{accuracy.p_value:.2g}",
                    f"{quality.kl:.4f}",
                ]
            )
        terminal.table(title, columns, rows)


def _experts(model: ModelResult) -> str:
    low, high = min(model.experts), max(model.experts)
    return str(low) if low == high else f"{low} to {high}"


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
