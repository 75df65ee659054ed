"""moe-surgery bench speculate."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe_surgery.bench.rounds import check_numbers, rounded
from moe_surgery.cli import drafts
from moe_surgery.cli.bench.shared import NUMBERS, collect, finish, machine, plot_option
from moe_surgery.cli.options import (
    Compute,
    common,
    compute_options,
    dense_option,
    dtype_name,
    needs_torch,
    terminal_of,
)
from moe_surgery.cli.terminal import Terminal, size
from moe_surgery.cli.text_options import TextArguments, optional_text_options
from moe_surgery.errors import UsageError

if TYPE_CHECKING:
    from moe_surgery.bench.speculation import SpeculationFigures, SpeculationRun
    from moe_surgery.bench.speculation_costs import LengthCost
    from moe_surgery.runtime.model import CausalLM
    from moe_surgery.runtime.speculation.draft_length import Costs


@click.command("speculate")
@click.argument("ckpt")
@drafts.several_draft_options
@click.option(
    "--draft-lengths",
    "lengths",
    type=NUMBERS,
    default="1,2,4,8",
    show_default=True,
    help="Tokens to draft per round.",
)
@optional_text_options
@click.option("--prompts", default=10, show_default=True, help="Texts to continue per domain.")
@click.option(
    "--prompt-tokens", default=32, show_default=True, help="Tokens of each text to use as its prompt."
)
@click.option(
    "--max-new-tokens", default=32, show_default=True, help="Maximum tokens to generate; for each prompt."
)
@click.option("--batch", default=1, show_default=True, help="Batch size of the measured steps.")
@click.option(
    "--depth",
    default=128,
    show_default=True,
    help="Tokens in the cache before the first measured step.",
)
@click.option("--rounds", default=5, show_default=True, help="Rounds; each measures every step once.")
@dense_option
@compute_options
@plot_option
@common
@click.pass_context
def command(
    context: click.Context,
    ckpt: str,
    draft: tuple[str, ...],
    draft_plan: tuple[Path, ...],
    draft_top_k: int | None,
    lengths: list[int],
    texts: TextArguments,
    prompts: int,
    prompt_tokens: int,
    max_new_tokens: int,
    batch: int,
    depth: int,
    rounds: int,
    dense: str,
    compute: Compute,
    plot: Path | None,
) -> None:
    """Measure speculative decoding with a draft, compared with plain greedy decoding.

    First the cost of a step: of the draft, and of the target over one and over several tokens. That gives the
    break-even acceptance rate: with acceptance rate a, n drafted tokens give (1 - a^(n+1)) / (1 - a) tokens for
    n draft steps and one target step over n + 1 tokens (arXiv 2211.17192; after a fully accepted round
    the draft's next step takes two tokens). Next to it the memory: weights that the draft adds, and both
    caches for --batch sequences of --depth tokens at the longest of --draft-lengths. With --texts also the
    acceptance rate by domain and position, and the speed-up on the same prompts, prefill included.

    \b
    moe-surgery bench speculate openai/gpt-oss-20b --draft-plan law-8.json --texts law.jsonl
    moe-surgery bench speculate example:tiny --draft-top-k 1 --draft-lengths 1,4 --depth 32
    """
    needs_torch("bench speculate")
    from moe_surgery.bench.plots import check_plot
    from moe_surgery.quality.corpus import open_corpus
    from moe_surgery.quality.prompts import check_prompts, prompts_of
    from moe_surgery.runtime.load import load_model
    from moe_surgery.runtime.text import Text

    terminal = terminal_of(context)
    check_plot(plot)
    check_numbers(prompts=[prompts], prompt_tokens=[prompt_tokens], max_new_tokens=[max_new_tokens])
    if not texts.paths and (texts.domains or texts.format is not None):
        raise UsageError("--domain and --format need --texts")
    domain_prompts = {}
    if texts.paths:
        corpus = open_corpus(texts.files(), Text(ckpt), context=prompt_tokens)
        domain_prompts = prompts_of(corpus, prompt_tokens, prompts)
    model = load_model(ckpt, dense=dense, **compute.arguments())
    setup = Setup(model, domain_prompts, lengths, max_new_tokens, batch, depth, rounds)
    results: list[Result] = []
    interrupted = False
    drafters = _drafts(model, ckpt, draft, draft_plan, draft_top_k)
    check_prompts(
        domain_prompts,
        max_new_tokens,
        [m.config.max_position_embeddings for m in (model, *(d for _, d in drafters))],
    )
    for name, drafter in drafters:
        result, interrupted = _measure(terminal, setup, name, drafter)
        results.append(result)
        if interrupted:
            break
    settings: dict[str, object] = {
        "target": ckpt,
        "dtype": dtype_name(model.dtype),
        "dense": dense,
        "device": compute.device,
        "backend": model.backend.name,
        "batch": batch,
        "depth": depth,
    }
    _print(terminal, settings, results, interrupted)
    if plot and any(r.lengths for r in results):
        _plot(plot, results)
    finish(terminal, interrupted, any(r.lengths or r.figures for r in results))


@dataclass(frozen=True)
class Setup:
    """What to measure with every draft."""

    target: CausalLM
    prompts: dict[str, list[list[int]]]
    lengths: list[int]
    max_new_tokens: int
    batch: int
    depth: int
    rounds: int


@dataclass(frozen=True)
class Result:
    """One draft: the memory it adds to the target's, the cost of rounds, and its figures on texts.

    Caches are those of a batch whose texts reach --depth tokens, at the longest of --draft-lengths.
    """

    draft: str
    experts: float
    top_k: int
    weight_bytes: int
    target_cache_bytes: int
    draft_cache_bytes: int
    costs: Costs | None
    lengths: list[LengthCost]
    figures: list[SpeculationFigures]


def _drafts(
    model: CausalLM, target: str, checkpoints: tuple[str, ...], plans: tuple[Path, ...], top_k: int | None
) -> list[tuple[str, CausalLM]]:
    chosen: list[tuple[str, str | None, Path | None]]
    chosen = [(name, name, None) for name in checkpoints] + [(str(p), None, p) for p in plans]
    if not chosen and top_k is not None:
        chosen = [(f"{target}, top-k {top_k}", None, None)]
    loaded = []
    for name, draft, plan in chosen:
        drafter = drafts.load_draft(model, target, draft, plan, top_k)
        assert drafter is not None
        loaded.append((name, drafter))
    if not loaded:
        raise UsageError("no draft; pass --draft, --draft-plan or --draft-top-k")
    return loaded


def _measure(terminal: Terminal, setup: Setup, name: str, draft: CausalLM) -> tuple[Result, bool]:
    """The figures of one draft, and whether Ctrl-C stopped it early."""
    from moe_surgery.bench.speculation import measure_speculation, speculation_figures
    from moe_surgery.bench.speculation_costs import break_even_rows, costs_of, measure_costs
    from moe_surgery.runtime.speculation.speculate import speculation_cache_bytes
    from moe_surgery.runtime.step_bytes import weight_bytes

    times, interrupted = collect(
        measure_costs(
            setup.target,
            draft,
            lengths=setup.lengths,
            batch=setup.batch,
            depth=setup.depth,
            rounds=setup.rounds,
        ),
        lambda t: f"{name}: {t.kind} step, {t.tokens} tokens: {t.seconds * 1e3:.3g} ms",
        terminal,
    )
    costs = costs_of(times)
    rows = break_even_rows(costs, setup.lengths) if costs else []
    runs: list[SpeculationRun] = []
    if setup.prompts and not interrupted:
        runs, interrupted = collect(
            measure_speculation(
                setup.target, draft, setup.prompts, lengths=setup.lengths, max_new_tokens=setup.max_new_tokens
            ),
            lambda r: f"{name}: {r.domain}, length {r.length}: {r.plain_seconds / r.seconds:.2f} x plain",
            terminal,
        )
    result = Result(
        name,
        statistics.mean(len(layer.router.weight) for layer in draft.layers),
        max(layer.top_k for layer in draft.layers),
        weight_bytes(draft, shared_with=setup.target),
        *speculation_cache_bytes(setup.target, draft, setup.batch, setup.depth, max(setup.lengths)),
        costs,
        rows,
        speculation_figures(runs),
    )
    return result, interrupted


def _print(terminal: Terminal, settings: dict[str, object], results: list[Result], interrupted: bool) -> None:
    if terminal.json:
        result = {"settings": settings, "drafts": [asdict(r) for r in results], "interrupted": interrupted}
        terminal.data(machine() | result)
        return
    summary = ", ".join(f"{name} {value}" for name, value in settings.items())
    if rows := [(r, row) for r in results for row in r.lengths]:
        cells = [
            (
                r.draft,
                rounded(r.experts),
                str(r.top_k),
                size(r.weight_bytes),
                size(r.target_cache_bytes),
                size(r.draft_cache_bytes),
                str(row.length),
                rounded(row.draft_seconds * 1e3),
                rounded(row.target_seconds * 1e3),
                rounded(row.plain_seconds * 1e3),
                "never" if row.break_even is None else f"{row.break_even:.2f}",
                rounded(row.most_speed_up),
            )
            for r, row in rows
        ]
        terminal.table(f"Cost of a round ({summary})", _COST_COLUMNS, cells)
    if texts := [_cells(r.draft, f) for r in results for f in r.figures]:
        terminal.table("On texts, compared with plain decoding", _TEXT_COLUMNS, texts)


_COST_COLUMNS = (
    "draft",
    "experts",
    "top-k",
    "added weights",
    "target cache",
    "draft cache",
    "length",
    "draft ms",
    "target ms",
    "plain step ms",
    "break-even acceptance",
    "best speed-up",
)
_TEXT_COLUMNS = (
    "draft",
    "domain",
    "length",
    "prompts",
    "acceptance",
    "by position",
    "tokens/target step",
    "ms/token",
    "plain ms/token",
    "speed-up (range)",
    "differing",
)


def _cells(draft: str, f: SpeculationFigures) -> tuple[str, ...]:
    def ratio(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    return (
        draft,
        f.domain,
        str(f.length),
        str(f.prompts),
        ratio(f.acceptance),
        " ".join(map(ratio, f.acceptance_by_position)),
        ratio(f.tokens_per_target_step),
        rounded(f.token_seconds * 1e3),
        rounded(f.plain_token_seconds * 1e3),
        str(f.speed_up),
        str(f.differing_prompts),
    )


def _plot(file: Path, results: list[Result]) -> None:
    """Acceptance by draft length, by experts kept if drafts differ in them, and the speed-up."""
    from moe_surgery.bench.plots import Panel, draw_panels

    by_length: dict[str, list[tuple[float, float]]] = {}
    by_experts: dict[str, list[tuple[float, float]]] = {}
    faster: dict[str, list[tuple[float, float]]] = {}
    for result in sorted(results, key=lambda r: r.experts):
        overall = [f for f in result.figures if f.domain == result.figures[-1].domain]
        for f in overall:
            faster.setdefault(result.draft, []).append((f.length, f.speed_up.median))
            if f.acceptance is not None:
                by_length.setdefault(result.draft, []).append((f.length, f.acceptance))
                by_experts.setdefault(f"length {f.length}", []).append((result.experts, f.acceptance))
        if edges := [(r.length, r.break_even) for r in result.lengths if r.break_even is not None]:
            by_length[f"break-even, {result.draft}"] = [(float(n), edge) for n, edge in edges]
    panels = [Panel("Acceptance", "draft length", "acceptance", by_length)]
    if len({r.experts for r in results}) > 1 and by_experts:
        panels.append(Panel("Acceptance", "experts kept", "acceptance", by_experts))
    if faster:
        panels.append(Panel("Against plain decoding", "draft length", "speed-up", faster))
    draw_panels(file, panels)
