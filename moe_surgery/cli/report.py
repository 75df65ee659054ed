"""moe-surgery report."""

from __future__ import annotations

from pathlib import Path

import click

from moe_surgery.cli.options import DOMAIN_HELP, OUTPUT, check_new_output, common, terminal_of
from moe_surgery.cli.terminal import size


@click.command("report")
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
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
@click.option(
    "--metric",
    "metrics",
    metavar="NAME",
    multiple=True,
    help="How to score experts: show this metric, the most important first; repeat for more; default: all that fit.",
)
@click.option(
    "--domain",
    "domains",
    metavar="NAME",
    multiple=True,
    help=f"{DOMAIN_HELP}: show only this one; repeat for more; default: all (at most 40).",
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
    sources: tuple[Path, ...],
    plans: tuple[Path, ...],
    evaluations: tuple[Path, ...],
    metrics: tuple[str, ...],
    domains: tuple[str, ...],
    output: Path,
    png: Path | None,
    title: str | None,
) -> None:
    """Show expert statistics or rankings as one HTML page.

    SOURCES are a statistics file written by `profile`; or folders and files of the published statistics
    (<dataset>/<category>/<outcome>.json), a domain a folder; or rankings: files and published:NAME. The page shows a
    heat map of layers and experts, how much domains overlap, how much the best experts cover, the curves of
    evaluations, and sortable tables, as far as the source has what they need. It is self-contained and loads nothing
    from the network, so the file can be shared. It stays below 3 MB: for large models with many domains it leaves
    out metrics and says so.

    \b
    moe-surgery report tiny.stats -o report.html
    moe-surgery report law.stats --plan law-8.json --evaluation cuts.json -o law.html --png figures
    moe-surgery report activations/mmlu_test -o mmlu.html
    moe-surgery report published:law published:math published:all -o rankings.html
    """
    from moe_surgery.checkpoint.fileops import FileOps
    from moe_surgery.checkpoint.writer import write_file
    from moe_surgery.quality.evaluation import load_evaluation
    from moe_surgery.report.page import build_report
    from moe_surgery.report.png import check_plotting, write_pictures
    from moe_surgery.report.sources import read_subject, source_files
    from moe_surgery.selection.plan import load_plan

    terminal = terminal_of(context)
    check_new_output(output, [*source_files(sources), *plans, *evaluations])
    if png is not None:
        check_plotting()
    subject = read_subject(sources, domains or None)
    named_plans = [(path.name, load_plan(path)) for path in plans]
    named_evaluations = [(path.name, load_evaluation(path)) for path in evaluations]
    count = len(subject.domains)
    kind = ("domain" if subject.measured else "ranking") + ("" if count == 1 else "s")
    what = f"{subject.layers} layers of {subject.experts} experts, {count} {kind}"
    terminal.detail(f"{', '.join(map(str, sources))}: {what}: {', '.join(subject.domains)}")
    page = build_report(subject, named_plans, named_evaluations, title, metrics=metrics or None).encode()
    write_file(output, page, FileOps())
    terminal.say(f"{output}: {size(len(page))}, {what}")
    pictures = []
    if png is not None:
        for path in write_pictures(png, subject, named_plans, named_evaluations):
            pictures.append(path)
            terminal.say(str(path))
    if terminal.json:
        terminal.data(
            {
                "output": str(output),
                "bytes": len(page),
                "identity": subject.identity,
                "layers": subject.layers,
                "experts": subject.experts,
                "domains": subject.domains,
                "plans": [name for name, _ in named_plans],
                "evaluations": [name for name, _ in named_evaluations],
                "pictures": [str(path) for path in pictures],
            }
        )
