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
from moe_surgery.cli.options import common, compute, dtype_name, needs_torch, terminal_of, torch_dtype
from moe_surgery.cli.terminal import Terminal, size
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
    help="Tokens drafted a round.",
)
@click.option(
    "--texts",
    "texts",
    metavar="FILE",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Texts as profile takes them, a file for each domain; repeat for more. Without: costs only.",
)
@click.option("--prompts", default=10, show_default=True, help="Texts of each domain to continue.")
@click.option("--prompt-tokens", default=32, show_default=True, help="Tokens of a text that are its prompt.")
@click.option("--max-new-tokens", default=32, show_default=True, help="Tokens to generate for each prompt.")
@click.option("--batch", default=1, show_default=True, help="Sequences in the steps whose cost is measured.")
@click.option(
    "--depth",
    default=128,
    show_default=True,
    help="Tokens in the cache before the steps whose cost is measured.",
)
@click.option("--rounds", default=5, show_default=True, help="Rounds; each measures every step once.")
@compute
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
    texts: tuple[Path, ...],
    prompts: int,
    prompt_tokens: int,
    max_new_tokens: int,
    batch: int,
    depth: int,
    rounds: int,
    device: str,
    dtype: str,
    backend: str | None,
    plot: Path | None,
) -> None:
    """Speculate with a draft, beside plain greedy decoding of the same prompts in the same run.

    First what a step costs: of the draft, and of the target over one and over several tokens. From that
    follows the break-even acceptance: with acceptance a, n drafted tokens give (1 - a^(n+1)) / (1 - a)
    tokens for n draft steps and a target step over n + 1 tokens (arXiv 2211.17192; where all were accepted
    the draft's next step takes two tokens). Beside it the memory: weights that the draft adds to the
    target's, and both caches for --batch texts of --depth tokens at the longest of --draft-lengths. With
    --texts also the acceptance there, by domain and position, and the speed-up, both prefills included.

    \b
    moe-surgery bench speculate openai/gpt-oss-20b --draft-plan law-8.json --texts law.jsonl
    moe-surgery bench speculate example:tiny --draft-top-k 1 --draft-lengths 1,4 --depth 32
    """
    needs_torch("bench speculate")
    from moe_surgery.bench.plots import check_plot
    from moe_surgery.quality.corpus import open_corpus, text_files
    from moe_surgery.quality.prompts import check_prompts, prompts_of
    from moe_surgery.runtime.load import load_model
    from moe_surgery.runtime.text import Text

    terminal = terminal_of(context)
    check_plot(plot)
    check_numbers(prompts=[prompts], prompt_tokens=[prompt_tokens], max_new_tokens=[max_new_tokens])
    asked = {}
    if texts:
        corpus = open_corpus(text_files(texts), Text(ckpt), context=prompt_tokens)
        asked = prompts_of(corpus, prompt_tokens, prompts)
    model = load_model(ckpt, device, torch_dtype(dtype), backend=backend)
    job = Job(model, asked, lengths, max_new_tokens, batch, depth, rounds)
    found: list[Result] = []
    interrupted = False
    drafters = _drafts(model, ckpt, draft, draft_plan, draft_top_k)
    check_prompts(
        asked, max_new_tokens, [m.config.max_position_embeddings for m in (model, *(d for _, d in drafters))]
    )
    for name, drafter in drafters:
        result, interrupted = _measured(terminal, job, name, drafter)
        found.append(result)
        if interrupted:
            break
    settings: dict[str, object] = {
        "target": ckpt,
        "dtype": dtype_name(model.dtype),
        "device": device,
        "backend": model.backend.name,
        "batch": batch,
        "depth": depth,
    }
    _say(terminal, settings, found, interrupted)
    if plot and any(r.lengths for r in found):
        _plot(plot, found)
    finish(terminal, interrupted, any(r.lengths or r.figures for r in found))


@dataclass(frozen=True)
class Job:
    """What is measured of every draft."""

    target: CausalLM
    prompts: dict[str, list[list[int]]]
    lengths: list[int]
    max_new_tokens: int
    batch: int
    depth: int
    rounds: int


@dataclass(frozen=True)
class Result:
    """One draft: what it adds to the target's memory, what rounds cost, and what came of them on texts.

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
    asked: list[tuple[str, str | None, Path | None]]
    asked = [(name, name, None) for name in checkpoints] + [(str(p), None, p) for p in plans]
    if not asked and top_k is not None:
        asked = [(f"{target}, top-k {top_k}", None, None)]
    found = []
    for name, draft, plan in asked:
        drafter = drafts.load_draft(model, target, draft, plan, top_k)
        assert drafter is not None
        found.append((name, drafter))
    if not found:
        raise UsageError("nothing drafts; pass --draft, --draft-plan or --draft-top-k")
    return found


def _measured(terminal: Terminal, job: Job, name: str, draft: CausalLM) -> tuple[Result, bool]:
    """What was measured of one draft, and whether Ctrl-C ended it early."""
    from moe_surgery.bench.speculation import measure_speculation, speculation_figures
    from moe_surgery.bench.speculation_costs import break_even_rows, costs_of, measure_costs
    from moe_surgery.runtime.speculation.speculate import speculation_cache_bytes
    from moe_surgery.runtime.step_bytes import weight_bytes

    times, interrupted = collect(
        measure_costs(
            job.target, draft, lengths=job.lengths, batch=job.batch, depth=job.depth, rounds=job.rounds
        ),
        lambda t: f"{name}: {t.kind} step, {t.tokens} tokens: {t.seconds * 1e3:.3g} ms",
        terminal,
    )
    costs = costs_of(times)
    rows = break_even_rows(costs, job.lengths) if costs else []
    runs: list[SpeculationRun] = []
    if job.prompts and not interrupted:
        runs, interrupted = collect(
            measure_speculation(
                job.target, draft, job.prompts, lengths=job.lengths, max_new_tokens=job.max_new_tokens
            ),
            lambda r: f"{name}: {r.domain}, length {r.length}: {r.plain_seconds / r.seconds:.2f} x plain",
            terminal,
        )
    result = Result(
        name,
        statistics.mean(len(layer.router.weight) for layer in draft.layers),
        max(layer.top_k for layer in draft.layers),
        weight_bytes(draft, beside=job.target),
        *speculation_cache_bytes(job.target, draft, job.batch, job.depth, max(job.lengths)),
        costs,
        rows,
        speculation_figures(runs),
    )
    return result, interrupted


def _say(terminal: Terminal, settings: dict[str, object], found: list[Result], interrupted: bool) -> None:
    if terminal.json:
        result = {"settings": settings, "drafts": [asdict(r) for r in found], "interrupted": interrupted}
        terminal.data(machine() | result)
        return
    shown = ", ".join(f"{name} {value}" for name, value in settings.items())
    if rows := [(r, row) for r in found for row in r.lengths]:
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
        terminal.table(f"Cost of a round ({shown})", _COST_COLUMNS, cells)
    if texts := [_cells(r.draft, f) for r in found for f in r.figures]:
        terminal.table("On texts, beside plain decoding", _TEXT_COLUMNS, texts)


_COST_COLUMNS = (
    "draft",
    "experts",
    "top-k",
    "adds weights",
    "target cache",
    "draft cache",
    "length",
    "draft ms",
    "target ms",
    "plain step ms",
    "break-even acceptance",
    "speed-up at 1",
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
    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    return (
        draft,
        f.domain,
        str(f.length),
        str(f.prompts),
        share(f.acceptance),
        " ".join(map(share, f.acceptance_by_position)),
        share(f.tokens_per_target_step),
        rounded(f.token_seconds * 1e3),
        rounded(f.plain_token_seconds * 1e3),
        str(f.speed_up),
        str(f.differing_prompts),
    )


def _plot(file: Path, found: list[Result]) -> None:
    """Acceptance by draft length, by experts kept where drafts differ in them, and the speed-up."""
    from moe_surgery.bench.plots import Panel, draw_panels

    by_length: dict[str, list[tuple[float, float]]] = {}
    by_experts: dict[str, list[tuple[float, float]]] = {}
    faster: dict[str, list[tuple[float, float]]] = {}
    for result in sorted(found, key=lambda r: r.experts):
        whole = [f for f in result.figures if f.domain == result.figures[-1].domain]
        for f in whole:
            faster.setdefault(result.draft, []).append((f.length, f.speed_up.median))
            if f.acceptance is not None:
                by_length.setdefault(result.draft, []).append((f.length, f.acceptance))
                by_experts.setdefault(f"length {f.length}", []).append((result.experts, f.acceptance))
        if edges := [(r.length, r.break_even) for r in result.lengths if r.break_even is not None]:
            by_length[f"break-even, {result.draft}"] = [(float(n), edge) for n, edge in edges]
    panels = [Panel("Acceptance", "draft length", "acceptance", by_length)]
    if len({r.experts for r in found}) > 1 and by_experts:
        panels.append(Panel("Acceptance", "experts kept", "acceptance", by_experts))
    if faster:
        panels.append(Panel("Against plain decoding", "draft length", "speed-up", faster))
    draw_panels(file, panels)
