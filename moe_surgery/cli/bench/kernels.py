"""moe-surgery bench kernels."""

from __future__ import annotations

from pathlib import Path

import click

from moe_surgery.bench.rounds import rounded
from moe_surgery.cli.bench.shared import NUMBERS, collect, finish, machine, plot_option
from moe_surgery.cli.options import BACKEND_HELP, common, device_option, needs_torch, terminal_of


@click.command("kernels")
@click.option(
    "--expert-counts",
    type=NUMBERS,
    default="4,8,16,32",
    show_default=True,
    help="Numbers of experts to measure.",
)
@click.option("--tokens", type=NUMBERS, default="1", show_default=True, help="Tokens per call.")
@click.option("--hidden", default=2880, show_default=True, help="Hidden and intermediate size.")
@click.option("--rounds", default=10, show_default=True, help="Rounds; each measures every call once.")
@device_option
@click.option("--backend", help=f"{BACKEND_HELP}; default: all that run on the device.")
@plot_option
@common
@click.pass_context
def command(
    context: click.Context,
    expert_counts: list[int],
    tokens: list[int],
    hidden: int,
    rounds: int,
    device: str,
    backend: str | None,
    plot: Path | None,
) -> None:
    """Measure routing, experts and a dense product of one layer, per backend.

    Weights are random, of gpt-oss-20b's size unless --hidden is given. Bytes are those of the weights a call must read,
    compared with a plain read loop. Every call reads the same weights, so what fits the last-level
    cache is read from there; at --hidden 2880 most does not fit.

    \b
    moe-surgery bench kernels --tokens 1,8
    moe-surgery bench kernels --hidden 256 --expert-counts 4,32 --rounds 3
    """
    needs_torch("bench kernels")
    from moe_surgery.bench.kernels import kernel_figures, measure_kernels, usable_backends
    from moe_surgery.bench.memory import read_bandwidth
    from moe_surgery.bench.plots import Panel, check_plot, draw_panels
    from moe_surgery.runtime.device import open_device

    terminal = terminal_of(context)
    check_plot(plot)
    torch_device = open_device(device)
    names = usable_backends(torch_device) if backend is None else [backend]
    bandwidth = read_bandwidth(torch_device)
    runs, interrupted = collect(
        measure_kernels(
            names, torch_device, expert_counts=expert_counts, tokens=tokens, hidden=hidden, rounds=rounds
        ),
        lambda r: (
            f"round {r.number}: {r.backend} {r.operation}, {r.experts} experts, {r.tokens} tokens: "
            f"{r.seconds * 1e6:.0f} us"
        ),
        terminal,
    )
    figures = kernel_figures(runs, bandwidth)
    if terminal.json:
        summary = {"read_bandwidth": bandwidth, "hidden": hidden, "interrupted": interrupted}
        terminal.data(machine() | summary | {"rows": [f.as_dict() for f in figures]})
    elif figures:
        columns = ("backend", "operation", "experts", "tokens", "us", "MB", "GB/s", "of read loop")
        rows = [
            (
                f.backend,
                f.operation,
                str(f.experts),
                str(f.tokens),
                rounded(f.seconds * 1e6),
                rounded(f.read_bytes / 1e6),
                rounded(f.rate / 1e9),
                f"{f.share:.0%}",
            )
            for f in figures
        ]
        title = f"Kernels (hidden {hidden}, {torch_device}; plain read loop: {bandwidth / 1e9:.1f} GB/s)"
        terminal.table(title, columns, rows)
    if plot and figures:
        lines: dict[str, list[tuple[float, float]]] = {}
        for f in figures:
            lines.setdefault(f"{f.backend} {f.operation}, {f.tokens}", []).append((f.experts, f.rate / 1e9))
        draw_panels(plot, [Panel("Kernels", "experts", "GB/s of weights", lines)])
    finish(terminal, interrupted, bool(figures))
