"""moe-surgery bench decode."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe_surgery.bench.rounds import MedianRange, median_range, rounded
from moe_surgery.cli.bench.residency import bench_residency
from moe_surgery.cli.bench.shared import NUMBERS, SIZES, collect, finish, machine, plot_option
from moe_surgery.cli.options import Compute, common, compute_options, dtype_name, needs_torch, terminal_of
from moe_surgery.cli.terminal import Terminal, size
from moe_surgery.errors import UsageError

if TYPE_CHECKING:
    from moe_surgery.bench.decode import DecodeFigures
    from moe_surgery.runtime.model import CausalLM


@click.command("decode")
@click.argument("ckpts", nargs=-1, required=True, metavar="CKPT...")
@click.option(
    "--expert-counts", type=NUMBERS, help="Numbers of experts to measure; as views of the first CKPT."
)
@click.option(
    "--ranking",
    type=click.Path(path_type=Path),
    help="Ranking file or published:NAME (see plan); views keep its best experts; default: random ones.",
)
@click.option("--batches", type=NUMBERS, default="1", show_default=True, help="Batch sizes.")
@click.option(
    "--depth", default=128, show_default=True, help="Tokens in the cache before the first measured step."
)
@click.option("--steps", default=16, show_default=True, help="Tokens to decode per round.")
@click.option("--rounds", default=3, show_default=True, help="Rounds; each measures every model once.")
@click.option(
    "--dense",
    type=click.Choice(["keep", "q8_0"]),
    multiple=True,
    help="Format of dense matrices (attention, unembedding) in memory; repeat to compare; default: keep.",
)
@click.option(
    "--memory",
    type=SIZES,
    metavar="SIZE,SIZE,...",
    help="Limit on memory, such as 8GB: one CKPT is measured under each; experts that do not fit are read from disk.",
)
@click.option(
    "--residency",
    type=click.Path(path_type=Path),
    help="Statistics or plan file: the experts to have in memory first; with --memory.",
)
@compute_options
@plot_option
@common
@click.pass_context
def command(
    context: click.Context,
    ckpts: tuple[str, ...],
    expert_counts: list[int] | None,
    ranking: Path | None,
    batches: list[int],
    depth: int,
    steps: int,
    rounds: int,
    dense: tuple[str, ...],
    memory: list[int] | None,
    residency: Path | None,
    compute: Compute,
    plot: Path | None,
) -> None:
    """Measure decoding with every CKPT, compared with the first one.

    Shows tokens per second of prefill and decoding, time to first token, step latency, the bytes a step must
    read and what share of the bandwidth of a sequential read that is, and the memory of the process with
    all models (or of the device's allocator). Tokens are random, which spreads them over experts more
    evenly than real text.

    With --memory one CKPT is measured under each limit: bytes read from disk per token, the share of experts that
    were in memory, and what share of the rate at which the disk delivers random experts that is.

    \b
    moe-surgery bench decode openai/gpt-oss-20b gpt-oss-law-8 --batches 1,8
    moe-surgery bench decode openai/gpt-oss-20b --memory 6GB,8GB,12GB --plot memory.png
    moe-surgery bench decode example:tiny --expert-counts 4,16 --depth 32 --steps 4 --rounds 2
    moe-surgery bench decode example:tiny --dense keep --dense q8_0 --depth 32 --steps 4 --rounds 2
    """
    needs_torch("bench decode")
    from moe_surgery.bench.decode import decode_figures, measure_decoding
    from moe_surgery.bench.plots import check_plot
    from moe_surgery.runtime.load import load_model

    terminal = terminal_of(context)
    check_plot(plot)
    if memory is not None:
        if len(ckpts) > 1 or expert_counts or ranking or batches != [1] or dense:
            raise UsageError("--memory measures one CKPT, as stored and whole, at batch 1")
        bench_residency(terminal, ckpts[0], memory, residency, depth, steps, rounds, compute, plot)
        return
    if residency is not None:
        raise UsageError("--residency needs --memory")
    models: dict[str, CausalLM] = {}
    for chosen in dict.fromkeys(dense or ("keep",)):
        suffix = "" if chosen == "keep" else f", dense {chosen}"
        loaded = {name: load_model(name, dense=chosen, **compute.arguments()) for name in ckpts}
        views = _views(ckpts[0], loaded[ckpts[0]], expert_counts or [], ranking)
        models |= {name + suffix: model for name, model in (loaded | views).items()}
    full = next(iter(models.values()))
    runs, interrupted = collect(
        measure_decoding(models, batches=batches, depth=depth, steps=steps, rounds=rounds),
        lambda r: f"round {r.number}: {r.model}, batch {r.batch}: {sum(r.step_seconds):.3f} s",
        terminal,
    )
    figures = decode_figures(runs, models)
    bandwidth = median_range([r.read_bandwidth for r in runs]) if runs else None
    settings = {
        "depth": depth,
        "steps": steps,
        "rounds": rounds,
        "dtype": dtype_name(full.dtype),
        "device": compute.device,
    }
    _print(terminal, figures, bandwidth, settings | {"backend": full.backend.name}, interrupted)
    if plot and figures:
        _plot(plot, figures)
    finish(terminal, interrupted, bool(figures))


def _views(checkpoint: str, full: CausalLM, experts: list[int], ranking: Path | None) -> dict[str, CausalLM]:
    from moe_surgery.pipeline.planning import inspect
    from moe_surgery.runtime.view import view
    from moe_surgery.selection.plan import check_count, plan_from_ranking, plan_random
    from moe_surgery.selection.ranking import load_ranking

    ranked = None if ranking is None else load_ranking(ranking)
    views = {}
    for count in experts:
        check_count(count, full.config.num_local_experts, "expert_counts")
        plan = (
            plan_random(count, 0, inspect(checkpoint))
            if ranked is None
            else plan_from_ranking(ranked, count, model_type=full.config.model_type)
        )
        if count < full.config.num_local_experts:
            views[f"{count} experts"] = view(full, plan)
    return views


def _print(
    terminal: Terminal,
    figures: list[DecodeFigures],
    bandwidth: MedianRange | None,
    settings: dict[str, object],
    interrupted: bool,
) -> None:
    if terminal.json:
        summary = {
            "read_bandwidth": bandwidth and bandwidth.median,
            "settings": settings,
            "interrupted": interrupted,
        }
        terminal.data(machine() | summary | {"rows": [f.as_dict() for f in figures]})
        return
    if bandwidth is None:
        return
    columns = (
        "model",
        "experts",
        "batch",
        "tokens/s (range)",
        "vs first (range)",
        "ms/step",
        "p95",
        "first token ms",
        "prefill tokens/s",
        "MB/token",
        "of bandwidth",
        "weights",
        "cache",
        "process",
    )
    rows = [
        (
            f.model,
            rounded(f.experts),
            str(f.batch),
            str(f.decode_rate),
            "" if f.ratio is None else str(f.ratio),
            rounded(f.latency * 1e3),
            rounded(f.latency_p95 * 1e3),
            rounded(f.first_token_seconds * 1e3),
            rounded(f.prefill_rate.median),
            rounded(f.bytes_per_token / 1e6),
            f"{f.bandwidth_share:.0%}",
            size(f.weight_bytes),
            size(f.cache_bytes),
            size(f.memory_bytes),
        )
        for f in figures
    ]
    setup = ", ".join(f"{name} {value}" for name, value in settings.items())
    read = f"{bandwidth.median / 1e9:.1f} GB/s ({bandwidth.low / 1e9:.1f}-{bandwidth.high / 1e9:.1f})"
    terminal.table(f"Decoding ({setup}; plain read loop: {read})", columns, rows)


def _plot(file: Path, figures: list[DecodeFigures]) -> None:
    from moe_surgery.bench.plots import Panel, draw_panels

    lines: dict[str, list[tuple[float, float]]] = {}
    for f in sorted(figures, key=lambda f: f.experts):
        lines.setdefault(f"batch {f.batch}", []).append((f.experts, f.decode_rate.median))
    draw_panels(file, [Panel("Decoding", "experts kept", "tokens/s", lines)])
