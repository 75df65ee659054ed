"""moe-surgery generate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import click

from moe_surgery.cli import drafts
from moe_surgery.cli.options import (
    SIZE,
    Compute,
    common,
    compute_options,
    dense_option,
    needs_torch,
    router_top_k,
    terminal_of,
)
from moe_surgery.cli.reply import ReplyView
from moe_surgery.cli.terminal import Terminal, size
from moe_surgery.cli.text_options import prompt_options, read_stdin
from moe_surgery.errors import UsageError

if TYPE_CHECKING:
    from moe_surgery.runtime.model import CausalLM
    from moe_surgery.runtime.sampling import Sampling
    from moe_surgery.runtime.speculation.draft_length import AdaptiveLength
    from moe_surgery.runtime.text import Text


class Settings(TypedDict):
    """What plain and speculative generation have in common."""

    max_new_tokens: int
    sampling: Sampling
    stop_tokens: Sequence[int] | None
    context: int | None


@click.command("generate")
@click.argument("ckpt")
@prompt_options
@click.option(
    "--reasoning",
    type=click.Choice(["show", "hide"]),
    default="show",
    show_default=True,
    help="Show the reasoning on stderr (dimmed on a terminal), or hide it.",
)
@click.option(
    "--reasoning-effort",
    type=click.Choice(["low", "medium", "high"]),
    help="Reasoning effort, for chat templates that support it.",
)
@click.option(
    "--plan", "plan_file", type=click.Path(path_type=Path), help="Plan file; the model uses only its experts."
)
@router_top_k
@click.option(
    "--max-new-tokens", type=int, default=256, show_default=True, help="Maximum tokens to generate."
)
@click.option(
    "--context",
    type=int,
    help="Context length in tokens; prompt and answer together; default: the model's.",
)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option(
    "--sampling-top-k",
    type=int,
    default=0,
    metavar="N",
    help="Sample from the N most likely tokens; 0: all. (--top-k is for experts.)",
)
@click.option(
    "--top-p",
    type=float,
    default=1.0,
    show_default=True,
    help="Sample from the most likely tokens with this total probability.",
)
@click.option(
    "--min-p",
    type=float,
    default=0.0,
    show_default=True,
    help="Drop tokens less likely than this fraction of the most likely one.",
)
@click.option("--seed", type=int, help="Random seed; default: a new one each time.")
@drafts.draft_options
@click.option(
    "--draft-length",
    "draft_length",
    metavar="N|auto",
    help="Tokens to draft per step of the model; default: 4.",
)
@dense_option
@click.option(
    "--memory",
    type=SIZE,
    help="Limit on memory, such as 8GB: experts that do not fit are read from disk when they are needed.",
)
@click.option(
    "--residency",
    type=click.Path(path_type=Path),
    help="Statistics or plan file: the experts to have in memory first; with --memory.",
)
@compute_options
@common
@click.pass_context
def command(
    click_context: click.Context,
    ckpt: str,
    prompt: str | None,
    chat: str | None,
    reasoning: str,
    reasoning_effort: str | None,
    plan_file: Path | None,
    top_k: int | None,
    max_new_tokens: int,
    context: int | None,
    temperature: float,
    sampling_top_k: int,
    top_p: float,
    min_p: float,
    seed: int | None,
    draft: str | None,
    draft_plan: Path | None,
    draft_top_k: int | None,
    draft_length: str | None,
    dense: str,
    memory: int | None,
    residency: Path | None,
    compute: Compute,
) -> None:
    """Generate text with a full or pruned checkpoint.

    Weights are memory-mapped and MXFP4 experts stay packed, so a model starts at once. With
    --plan the full checkpoint behaves like the pruned one, without writing it.

    The answer goes to stdout; the reasoning of a model in OpenAI's harmony format goes to stderr. --json has
    both: "answer" and "reasoning".

    With --draft, --draft-plan or --draft-top-k a cheaper model proposes tokens and the full one checks
    several at a time: the output is still the full model's (exactly with the default CPU backend).

    With --memory a model runs in less memory than its weights take, with the same output: what every token uses is
    held, and as many experts as fit.

    \b
    moe-surgery generate example:tiny --prompt "12 + 30 =" --max-new-tokens 8
    moe-surgery generate example:tiny --prompt "12 + 30 =" --max-new-tokens 8 --memory 8GB
    moe-surgery generate example:tiny --chat "What is 2 + 2?" --temperature 0.7 --seed 1
    moe-surgery generate example:tiny --prompt "12 + 30 =" --draft-top-k 2 --draft-length auto --dtype f32
    moe-surgery generate example:tiny --prompt "12 + 30 =" --max-new-tokens 8 --dense q8_0
    echo "def main(" | moe-surgery generate example:tiny --max-new-tokens 16
    """
    needs_torch("generate")
    from moe_surgery.runtime.sampling import Sampling
    from moe_surgery.runtime.text import Text

    terminal = terminal_of(click_context)
    if prompt is not None and chat is not None:
        raise UsageError("choose one of --prompt and --chat")
    sampling = Sampling(temperature, sampling_top_k, top_p, min_p, seed)
    num_draft_tokens = drafts.draft_length(draft_length)
    text = Text(ckpt)
    rendered = prompt if chat is None else _chat_prompt(text, ckpt, chat, reasoning_effort)
    if chat is None and reasoning_effort is not None:
        raise UsageError("--reasoning-effort needs --chat")
    tokens = text.encode(rendered if rendered is not None else read_stdin())
    if not tokens:
        raise UsageError("the prompt is empty; pass --prompt TEXT, --chat TEXT, or text on stdin")
    model = _load(ckpt, compute, plan_file, top_k, dense, memory, residency)
    terminal.detail(f"{model.backend.name} backend on {model.device}, {len(tokens)} prompt tokens")
    drafter = drafts.load_draft(model, ckpt, draft, draft_plan, draft_top_k)
    if drafter is None and num_draft_tokens is not None:
        raise UsageError("--draft-length needs --draft, --draft-plan or --draft-top-k")
    if top_k is not None and top_k != model.config.num_experts_per_tok:
        terminal.say(
            f"note: the router chooses {top_k} experts per token instead of {model.config.num_experts_per_tok}; "
            "to limit the tokens to sample from use --sampling-top-k"
        )
    settings: Settings = {
        "max_new_tokens": max_new_tokens,
        "sampling": sampling,
        "stop_tokens": text.stop_tokens or None,
        "context": context,
    }
    view = ReplyView(terminal, reasoning=reasoning == "show")
    _run(terminal, view, model, drafter, num_draft_tokens, text, tokens, settings)


def _chat_prompt(text: Text, ckpt: str, chat: str, effort: str | None) -> str:
    variables = {} if effort is None else {"reasoning_effort": effort}
    if effort is not None and not text.reads("reasoning_effort"):
        raise UsageError(f"--reasoning-effort {effort}: the chat template of {ckpt} does not support it")
    return text.chat([{"role": "user", "content": chat}], variables=variables)


def _load(
    ckpt: str,
    compute: Compute,
    plan_file: Path | None,
    top_k: int | None,
    dense: str,
    memory: int | None,
    residency: Path | None,
) -> CausalLM:
    from moe_surgery.runtime.load import load_model
    from moe_surgery.selection.plan import load_plan

    plan = None if plan_file is None else load_plan(plan_file)
    return load_model(
        ckpt, plan=plan, top_k=top_k, dense=dense, memory=memory, residency=residency, **compute.arguments()
    )


def _run(
    terminal: Terminal,
    view: ReplyView,
    model: CausalLM,
    draft: CausalLM | None,
    length: int | AdaptiveLength | None,
    text: Text,
    tokens: list[int],
    settings: Settings,
) -> None:
    from moe_surgery.runtime.generate import Generated, Step, generate
    from moe_surgery.runtime.speculation.speculate import DEFAULT_DRAFT_LENGTH, Speculated, speculate
    from moe_surgery.runtime.speculation.statistics import Round
    from moe_surgery.runtime.usage import Stopwatch, peak_memory

    watch, parser = Stopwatch(), text.parser(tokens)

    def on_step(step: Step | Round) -> None:
        new = step.tokens.tolist() if isinstance(step, Step) else step.tokens[0]
        watch.step(len(new))
        view.show([piece for token in new for piece in parser.push(token)])

    result: Generated | Speculated
    if draft is None:
        result = generate(model, [tokens], callback=on_step, **settings)
    else:
        result = speculate(
            model,
            draft,
            [tokens],
            draft_length=DEFAULT_DRAFT_LENGTH if length is None else length,
            callback=on_step,
            **settings,
        )
    new, peak = result.tokens[0], peak_memory(model.device)
    drafted = result.statistics if isinstance(result, Speculated) else None
    view.show(parser.flush())
    view.end()
    if terminal.json:
        reply = text.split(tokens, new)
        terminal.data(
            {
                "text": text.decode(new),
                "answer": reply.answer,
                "reasoning": reply.reasoning,
                "tool_calls": [asdict(call) for call in reply.tool_calls],
                "tokens": new,
                "log_probabilities": result.log_probabilities[0],
                "prompt_tokens": len(tokens),
                "prefill_seconds": watch.prefill_seconds,
                "decode_tokens_per_second": watch.decode_rate(),
                "peak_memory_bytes": peak,
                "backend": model.backend.name,
                "device": str(model.device),
                **({} if drafted is None else {"speculation": drafted.as_dict()}),
            }
        )
        return
    terminal.say(
        f"{len(tokens)} prompt tokens at {len(tokens) / watch.prefill_seconds:.1f}/s, {len(new)} new tokens at "
        f"{watch.decode_rate():.1f}/s, peak memory {size(peak)} ({model.backend.name} on {model.device})"
    )
    if drafted is not None and drafted.acceptance is not None:
        terminal.say(
            f"{drafted.acceptance:.0%} of {sum(drafted.tried)} drafted tokens accepted, "
            f"{drafted.tokens_per_target_step:.2f} tokens per target step"
        )
