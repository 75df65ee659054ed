"""moe-surgery stats: merge and show statistics files."""

from __future__ import annotations

from pathlib import Path

import click

from moe_surgery.cli.options import OUTPUT, check_new_output, common, computed_by, terminal_of


@click.group("stats")
def command() -> None:
    """Show and merge the statistics files of `profile`.

    \b
    moe-surgery stats show tiny.stats
    moe-surgery stats merge monday.stats tuesday.stats -o both.stats
    """


@command.command("merge")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=OUTPUT, required=True, help="Write the statistics here.")
@common
@click.pass_context
def merge_command(context: click.Context, files: tuple[Path, ...], output: Path) -> None:
    """Merge statistics of one checkpoint from several runs; domains of the same name are added up.

    Refuses files that share texts, which would count twice, and files that differ in backend, kind of
    device or dtype. Files of earlier versions, which do not record these, match any.

    \b
    moe-surgery stats merge monday.stats tuesday.stats -o both.stats
    """
    from moe_surgery.selection.statistics import COMPUTATION, load_statistics, merge, save_statistics

    terminal = terminal_of(context)
    check_new_output(output, files)
    parts = [load_statistics(file) for file in files]
    merged = merge(parts, [str(file) for file in files])
    for file, part in zip(files, parts, strict=True):
        if unknown := [key for key in COMPUTATION if part.settings.get(key) is None]:
            terminal.say(
                f"note: {file} does not record its {' and '.join(unknown)} (earlier versions did not); assumed to be "
                "the same as the others'"
            )
    save_statistics(merged, output)
    if terminal.json:
        terminal.data({"output": str(output), "checkpoint": merged.identity, "tokens": merged.tokens})
        return
    for domain in merged.domains:
        terminal.result(f"{domain}: {merged.tokens[domain]:,} tokens of {len(merged.texts[domain])} texts")
    terminal.say(f"{output}: {len(files)} files merged")


@command.command("show")
@click.argument("file", type=click.Path(path_type=Path))
@common
@click.pass_context
def show_command(context: click.Context, file: Path) -> None:
    """Show a statistics file: checkpoint, domains, texts, and the share of routing weight in the best experts.

    \b
    moe-surgery stats show tiny.stats
    """
    from moe_surgery.selection.coverage import coverage
    from moe_surgery.selection.statistics import load_statistics

    terminal = terminal_of(context)
    statistics = load_statistics(file)
    if terminal.json:
        terminal.data(
            {
                "checkpoint": statistics.identity,
                "model_type": statistics.model_type,
                "layers": statistics.layers,
                "experts": statistics.experts,
                "top_k": statistics.top_k,
                "tokens": statistics.tokens,
                "texts": statistics.texts,
                "settings": statistics.settings,
            }
        )
        return
    terminal.result(
        f"{statistics.model_type}, {statistics.layers} layers of {statistics.experts} experts, top-{statistics.top_k}, "
        f"checkpoint {statistics.identity}"
    )
    terminal.result(computed_by(statistics.settings))
    counts = [n for n in (4, 8, 16, 24) if n < statistics.experts]
    rows = []
    for domain in statistics.domains:
        shares = coverage(statistics.over([domain]))
        cells = [f"{shares[:, n - 1].mean():.0%} ({shares[:, n - 1].min():.0%})" for n in counts]
        rows.append([domain, f"{statistics.tokens[domain]:,}", str(len(statistics.texts[domain])), *cells])
    terminal.table(
        "share of routing weight in the best n experts: mean over layers (worst layer)",
        ["domain", "tokens", "texts", *(f"n = {n}" for n in counts)],
        rows,
    )
