"""moe-surgery bench surgery."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from moe_surgery.bench.rounds import rounded
from moe_surgery.cli.bench.shared import NUMBERS, collect, finish, machine, plot_option
from moe_surgery.cli.options import common, terminal_of
from moe_surgery.cli.terminal import size
from moe_surgery.errors import UsageError
from moe_surgery.formats.expert_format import EXPERT_DTYPES


@click.command("surgery")
@click.argument("ckpt")
@click.option(
    "--expert-counts",
    type=NUMBERS,
    default="4,8,16",
    show_default=True,
    help="Numbers of experts to measure.",
)
@click.option(
    "--store",
    type=click.Choice(EXPERT_DTYPES),
    default="keep",
    show_default=True,
    help="Format of expert weights in the output.",
)
@click.option("--rounds", default=3, show_default=True, help="Rounds; each measures every number once.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Folder with space for an output and its copy; default: the system's temporary folder.",
)
@click.option("--cold", is_flag=True, help="Drop the machine's page cache before each command (needs root).")
@plot_option
@common
@click.pass_context
def command(
    context: click.Context,
    ckpt: str,
    expert_counts: list[int],
    store: str,
    rounds: int,
    work: Path | None,
    cold: bool,
    plot: Path | None,
) -> None:
    """Measure inspect, prune and verify of CKPT, compared with cp and sync of the same bytes.

    Experts are random; outputs are deleted. Without --cold the source is read from the page cache if it
    is there.

    \b
    moe-surgery bench surgery openai/gpt-oss-20b --expert-counts 8 --work /var/tmp
    moe-surgery bench surgery example:tiny --expert-counts 8 --rounds 1
    """
    from moe_surgery.bench.plots import Panel, check_plot, draw_panels
    from moe_surgery.bench.surgery import (
        drop_page_cache,
        measure_surgery,
        surgery_figures,
    )
    from moe_surgery.checkpoint.gguf.resolve import is_gguf
    from moe_surgery.checkpoint.resolve import resolve
    from moe_surgery.pipeline.planning import inspect
    from moe_surgery.selection.plan import check_count

    terminal = terminal_of(context)
    check_plot(plot)
    if is_gguf(ckpt):
        resolve(ckpt)  # which says what it is
    model = inspect(ckpt)
    for count in expert_counts:
        check_count(count, model.experts, "expert_counts")
    folder = work or Path(tempfile.gettempdir())
    if cold and not drop_page_cache():
        raise UsageError("--cold: cannot drop the page cache; run as root on Linux, or without --cold")
    runs, interrupted = collect(
        measure_surgery(ckpt, folder, expert_counts=expert_counts, store=store, rounds=rounds, cold=cold),
        lambda r: f"round {r.number}: {r.experts} experts: {r.prune.seconds / r.copy.seconds:.2f} x cp",
        terminal,
    )
    rows = surgery_figures(runs)
    state = "dropped page cache" if cold else "page cache not dropped"
    if terminal.json:
        terminal.data(
            machine()
            | {
                "checkpoint": ckpt,
                "page_cache": state,
                "rows": rows,
                "interrupted": interrupted,
            }
        )
    else:
        _table(context, ckpt, state, rows)
    if plot and rows:
        points = [(float(str(r["experts"])), float(str(r["ratio_to_copy"]))) for r in rows]
        draw_panels(plot, [Panel("Pruning", "experts kept", "x cp + sync", {ckpt: points})])
    finish(terminal, interrupted, bool(rows))


def _table(
    context: click.Context,
    ckpt: str,
    state: str,
    rows: list[dict[str, object]],
) -> None:
    terminal = terminal_of(context)
    columns = (
        "experts",
        "inspect s",
        "peak memory",
        "written",
        "prune s",
        "cp + sync s",
        "x cp",
        "peak memory",
        "verify s",
        "read once s",
        "x read",
        "peak memory",
    )

    def cells(row: dict[str, object]) -> list[str]:
        def number(key: str) -> float:
            return float(str(row[key]))

        return [
            str(row["experts"]),
            rounded(number("inspect_seconds")),
            size(number("inspect_peak_bytes")),
            size(number("output_bytes")),
            rounded(number("prune_seconds")),
            rounded(number("copy_seconds")),
            rounded(number("ratio_to_copy")),
            size(number("prune_peak_bytes")),
            rounded(number("verify_seconds")),
            rounded(number("read_seconds")),
            rounded(number("ratio_to_read")),
            size(number("verify_peak_bytes")),
        ]

    if rows:
        terminal.table(f"Surgery on {ckpt} ({state})", columns, [cells(row) for row in rows])
