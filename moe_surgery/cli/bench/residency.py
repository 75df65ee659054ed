"""moe-surgery bench decode --memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moe_surgery.bench.rounds import rounded
from moe_surgery.cli.bench.shared import collect, finish, machine
from moe_surgery.cli.options import Compute
from moe_surgery.cli.terminal import Terminal, size

if TYPE_CHECKING:
    from moe_surgery.bench.residency import ResidencyFigures

__all__ = ["bench_residency"]


def bench_residency(
    terminal: Terminal,
    ckpt: str,
    limits: list[int],
    residency: Path | None,
    depth: int,
    steps: int,
    rounds: int,
    compute: Compute,
    plot: Path | None,
) -> None:
    """Measure decoding of `ckpt` under each limit, and print or plot the figures."""
    from moe_surgery.bench.residency import measure_residency, residency_figures
    from moe_surgery.runtime.load import load_model
    from moe_surgery.runtime.residency.model import ResidentCausalLM

    def load(limit: int) -> ResidentCausalLM:
        model = load_model(ckpt, memory=limit, residency=residency, **compute.arguments())
        assert isinstance(model, ResidentCausalLM)
        return model

    runs, interrupted = collect(
        measure_residency(load, limits, depth=depth, steps=steps, rounds=rounds),
        lambda r: f"round {r.number}: {size(r.memory)}: {r.decode_rate:.2f} tokens/s",
        terminal,
    )
    figures = residency_figures(runs)
    settings: dict[str, object] = {"depth": depth, "steps": steps, "rounds": rounds}
    if terminal.json:
        rows = {"rows": [f.as_dict() for f in figures]}
        terminal.data(machine() | {"settings": settings, "interrupted": interrupted} | rows)
    elif figures:
        _print(terminal, ckpt, figures, settings)
    if plot and figures:
        from moe_surgery.bench.plots import Panel, draw_panels

        points = [(f.memory / 1e9, f.decode_rate.median) for f in figures]
        draw_panels(plot, [Panel("Decoding", "memory limit (GB)", "tokens/s", {"": points})])
    finish(terminal, interrupted, bool(figures))


def _print(
    terminal: Terminal, ckpt: str, figures: list[ResidencyFigures], settings: dict[str, object]
) -> None:
    columns = (
        "memory",
        "experts held",
        "tokens/s (range)",
        "prefill tokens/s",
        "MB read/token",
        "hit rate",
        "by layer",
        "guesses right",
        "disk MB/s",
        "of disk",
        "peak",
    )
    rows = [
        (
            size(f.memory),
            f"{f.slots} of {f.experts}",
            str(f.decode_rate),
            rounded(f.prefill_rate.median),
            rounded(f.bytes_per_token / 1e6),
            f"{f.hit_rate:.0%}",
            f"{min(f.hit_rates):.0%}-{max(f.hit_rates):.0%}",
            f"{f.guess_precision:.0%}",
            rounded(f.disk_rate / 1e6),
            f"{f.disk_share:.0%}",
            size(f.peak_bytes),
        )
        for f in figures
    ]
    setup = ", ".join(f"{name} {value}" for name, value in settings.items())
    terminal.table(f"Decoding {ckpt} under limits on memory ({setup})", columns, rows)
