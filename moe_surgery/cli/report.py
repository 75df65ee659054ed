"""moe-surgery report."""

from __future__ import annotations

from pathlib import Path

import click

from moe_surgery.cli.options import OUTPUT, check_new_output, common, terminal_of
from moe_surgery.cli.terminal import size


@click.command("report")
@click.argument("stats", type=click.Path(path_type=Path))
@click.option(
    "--plan",
    "plans",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Plan file; the experts it keeps are marked; repeat for more.",
)
@click.option(
    "--evaluation",
    "evaluations",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Evaluation file to show; repeat for more.",
)
@click.option("-o", "--output", required=True, type=OUTPUT, help="Write the HTML page here.")
@click.option(
    "--png",
    metavar="DIR",
    type=OUTPUT,
    help="Also write figures for papers to this folder, 300 dpi (needs '.[report]').",
)
@click.option("--title", help="Heading of the page.")
@common
@click.pass_context
def command(
    context: click.Context,
    stats: Path,
    plans: tuple[Path, ...],
    evaluations: tuple[Path, ...],
    output: Path,
    png: Path | None,
    title: str | None,
) -> None:
    """Show expert statistics as one HTML page.

    STATS is a statistics file written by `profile`. The page shows a heat map of layers and experts, how much domains
    overlap, how much the best experts cover, the curves of evaluations, and sortable tables. It is
    self-contained and loads nothing from the network, so the file can be shared.

    \b
    moe-surgery report tiny.stats -o report.html
    moe-surgery report law.stats --plan law-8.json --evaluation cuts.json -o law.html --png figures
    """
    from moe_surgery.checkpoint.fileops import FileOps
    from moe_surgery.checkpoint.writer import write_file
    from moe_surgery.quality.evaluation import load_evaluation
    from moe_surgery.report.page import build_report
    from moe_surgery.report.png import check_plotting, write_pictures
    from moe_surgery.selection.plan import load_plan
    from moe_surgery.selection.statistics import load_statistics

    terminal = terminal_of(context)
    check_new_output(output, [stats, *plans, *evaluations])
    if png is not None:
        check_plotting()
    statistics = load_statistics(stats)
    named_plans = [(path.name, load_plan(path)) for path in plans]
    named_evaluations = [(path.name, load_evaluation(path)) for path in evaluations]
    terminal.detail(
        f"{stats}: {statistics.layers} layers of {statistics.experts} experts, {statistics.domains}"
    )
    page = build_report(statistics, named_plans, named_evaluations, title).encode()
    write_file(output, page, FileOps())
    terminal.say(
        f"{output}: {size(len(page))}, {statistics.layers} layers of {statistics.experts} experts, "
        f"{len(statistics.domains)} domains"
    )
    pictures = []
    if png is not None:
        for path in write_pictures(png, statistics, named_plans, named_evaluations):
            pictures.append(path)
            terminal.say(str(path))
    if terminal.json:
        terminal.data(
            {
                "output": str(output),
                "bytes": len(page),
                "identity": statistics.identity,
                "layers": statistics.layers,
                "experts": statistics.experts,
                "domains": statistics.domains,
                "plans": [name for name, _ in named_plans],
                "evaluations": [name for name, _ in named_evaluations],
                "pictures": [str(path) for path in pictures],
            }
        )
