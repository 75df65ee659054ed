"""moe-surgery rank."""

from __future__ import annotations

from pathlib import Path

import click

from moe_surgery.cli.options import common, terminal_of

METRICS = ("frequency", "gate", "ean_sum", "ean_mean", "weighted_ean", "reap", "ean_ca")


@click.command("rank")
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--metric", type=click.Choice(METRICS), default="frequency", show_default=True, help="What to rank by."
)
@click.option("--domain", help="Only these domains of the statistics, as a,b.")
@click.option(
    "--interleave-with",
    type=click.Path(path_type=Path),
    help="Take alternately from this ranking too, as the published topic rankings do.",
)
@click.option("--protect-super-experts", is_flag=True, help="Put outliers of activation first (REAP's rule).")
@click.option("--model-type", help="The model type to record, where the sources do not say it.")
@click.option(
    "--experts", "-n", type=int, help="The model's number of experts, where sources leave some out."
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write the ranking here, not to stdout."
)
@common
@click.pass_context
def command(
    context: click.Context,
    sources: tuple[Path, ...],
    metric: str,
    domain: str | None,
    interleave_with: Path | None,
    protect_super_experts: bool,
    model_type: str | None,
    experts: int | None,
    output: Path | None,
) -> None:
    """Order the experts of every layer from statistics.

    SOURCES are statistics files, or folders of the published statistics tree
    (<dataset>/<category>/<outcome>.json), which hold frequencies. The ranking goes to `plan` or
    `prune --ranking`.

    \b
    moe-surgery rank activations/ -o all.json --model-type gpt_oss
    moe-surgery rank activations/mmlu_test/professional_law --interleave-with all.json -o law.json
    moe-surgery rank law.stats --metric reap -o law-reap.json
    """
    from moe_surgery.checkpoint.fileops import FileOps
    from moe_surgery.checkpoint.writer import write_file
    from moe_surgery.selection.published import interleave
    from moe_surgery.selection.rank import rank_sources
    from moe_surgery.selection.ranking import load_ranking

    terminal = terminal_of(context)
    domains = None if domain is None else [d.strip() for d in domain.split(",")]
    ranking = rank_sources(
        sources,
        metric,
        domains=domains,
        protect_super_experts=protect_super_experts,
        model_type=model_type,
        experts=experts,
    )
    if interleave_with is not None:
        ranking = interleave(ranking, load_ranking(interleave_with))
    if output is None:
        click.echo(ranking.to_json())
        return
    write_file(output, ranking.to_json().encode() + b"\n", FileOps())
    if terminal.json:
        terminal.data({"output": str(output), "metric": metric, "layers": ranking.layers})
    terminal.say(f"{output}: {len(ranking.layers)} layers of {ranking.num_experts} experts by {metric}")
