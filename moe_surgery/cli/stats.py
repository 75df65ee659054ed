"""moe-surgery stats: merge and show statistics files."""

from __future__ import annotations

from pathlib import Path

import click

from moe_surgery.cli.options import OUTPUT, check_new_output, common, computed_by, terminal_of


@click.group("stats")
def command() -> None:
    """Look at the statistics files that `profile` makes, and add them up.

    \b
    moe-surgery stats show tiny.stats
    moe-surgery stats merge monday.stats tuesday.stats -o both.stats
    """


@command.command("merge")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=OUTPUT, required=True, help="The statistics file to write.")
@common
@click.pass_context
def merge_command(context: click.Context, files: tuple[Path, ...], output: Path) -> None:
    """Add statistics of one checkpoint over several runs: domains of the same name become one.

    Texts that two files have in common are refused: they would count twice. So are files that differ in
    backend, kind of device or dtype; one of an earlier version, which does not name them all, fits any.

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
                f"note: {file} does not name its {' and '.join(unknown)} (earlier versions did not write "
                "it); taken to be the same as the others'"
            )
    save_statistics(merged, output)
    if terminal.json:
        terminal.data({"output": str(output), "checkpoint": merged.identity, "tokens": merged.tokens})
        return
    for domain in merged.domains:
        terminal.result(f"{domain}: {merged.tokens[domain]:,} tokens of {len(merged.texts[domain])} texts")
    terminal.say(f"{output}: {len(files)} files added")


@command.command("show")
@click.argument("file", type=click.Path(path_type=Path))
@common
@click.pass_context
def show_command(context: click.Context, file: Path) -> None:
    """Say what a statistics file holds: checkpoint, domains, texts, and how much few experts carry.

    \b
    moe-surgery stats show tiny.stats
    """
    from moe_surgery.selection.coverage import coverage
    from moe_surgery.selection.statistics import load_statistics

    terminal = terminal_of(context)
    found = load_statistics(file)
    if terminal.json:
        terminal.data(
            {
                "checkpoint": found.identity,
                "model_type": found.model_type,
                "layers": found.layers,
                "experts": found.experts,
                "top_k": found.top_k,
                "tokens": found.tokens,
                "texts": found.texts,
                "settings": found.settings,
            }
        )
        return
    terminal.result(
        f"{found.model_type}, {found.layers} layers of {found.experts} experts, top-{found.top_k}, "
        f"checkpoint {found.identity}"
    )
    terminal.result(computed_by(found.settings))
    counts = [n for n in (4, 8, 16, 24) if n < found.experts]
    rows = []
    for domain in found.domains:
        shares = coverage(found.over([domain]))
        cells = [f"{shares[:, n - 1].mean():.0%} ({shares[:, n - 1].min():.0%})" for n in counts]
        rows.append([domain, f"{found.tokens[domain]:,}", str(len(found.texts[domain])), *cells])
    terminal.table(
        "share of routing weight that the best n experts carry, mean over layers (worst layer)",
        ["domain", "tokens", "texts", *(f"n = {n}" for n in counts)],
        rows,
    )
