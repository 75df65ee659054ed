"""moe-surgery rank."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe_surgery.cli.options import OUTPUT, check_new_output, common, ranked, terminal_of
from moe_surgery.errors import UsageError

if TYPE_CHECKING:
    from moe_surgery.selection.ranking import Ranking


@click.command("rank")
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@ranked
@click.option(
    "--interleave-with",
    type=click.Path(path_type=Path),
    help="Take alternately from this ranking too, as the published topic rankings do.",
)
@click.option("--model-type", help="The model type to record: published statistics do not say it.")
@click.option(
    "--experts", "-n", type=int, help="The model's number of experts, where the statistics leave some out."
)
@click.option("-o", "--output", type=OUTPUT, help="Write the ranking here, not to stdout.")
@common
@click.pass_context
def command(
    context: click.Context,
    sources: tuple[Path, ...],
    metric: str | None,
    domains: list[str] | None,
    protect_super_experts: bool,
    interleave_with: Path | None,
    model_type: str | None,
    experts: int | None,
    output: Path | None,
) -> None:
    """Order the experts of every layer, best first.

    SOURCES are statistics files that `profile` made, ranked by --metric over all domains or those of
    --domain; or folders of the published statistics tree (<dataset>/<category>/<outcome>.json) and
    single files of it, ranked by frequency, by the published formula. The ranking goes to `plan` or
    `prune --ranking`.

    \b
    frequency      how many tokens chose the expert
    gate           sum of its routing weights
    ean_sum        sum of its outputs' norms       ean_mean   their mean
    weighted_ean   sum of weight times norm        reap       their mean (arXiv 2510.13999)
    ean_ca         norm of its mean output

    \b
    moe-surgery rank tiny.stats --metric reap --domain code -o code-ranking.json
    moe-surgery rank activations/ -o all.json --model-type gpt_oss
    moe-surgery rank activations/mmlu_test/professional_law --interleave-with all.json -o law.json
    """
    from moe_surgery.checkpoint.fileops import FileOps
    from moe_surgery.checkpoint.files import is_safetensors
    from moe_surgery.checkpoint.kinds import PUBLISHED_STATISTICS, STATISTICS, check_kind
    from moe_surgery.checkpoint.writer import write_file
    from moe_surgery.selection.published import interleave
    from moe_surgery.selection.ranking import load_ranking

    terminal = terminal_of(context)
    for source in sources:
        check_kind(source, "a statistics file", STATISTICS, PUBLISHED_STATISTICS)
    ours = [source for source in sources if is_safetensors(source)]
    if ours and len(ours) < len(sources):
        other = next(source for source in sources if source not in ours)
        raise UsageError(f"{other}: is no statistics file as {ours[0]} is; rank the two kinds apart")
    if ours:
        if model_type is not None or experts is not None:
            raise UsageError("--model-type and --experts go with published statistics; ours say both")
        check_new_output(output, [*sources, interleave_with])
        ranking = _gathered(sources, metric, domains, protect_super_experts)
        told = f"{len(sources)} statistics {'file' if len(sources) == 1 else 'files'}"
    else:
        if metric not in (None, "frequency") or domains is not None or protect_super_experts:
            raise UsageError(
                "published statistics are ranked by frequency alone; --metric, --domain and "
                "--protect-super-experts go with statistics that `profile` made"
            )
        ranking, told = _published(sources, experts, model_type, [output, interleave_with])
    if interleave_with is not None:
        ranking = interleave(ranking, load_ranking(interleave_with))
    if output is None:
        click.echo(ranking.to_json())
        return
    write_file(output, ranking.to_json().encode() + b"\n", FileOps())
    if terminal.json:
        terminal.data({"output": str(output), "layers": ranking.layers, "provenance": ranking.provenance})
    terminal.say(f"{output}: {len(ranking.layers)} layers of {ranking.num_experts} experts, from {told}")


def _gathered(
    sources: tuple[Path, ...], metric: str | None, domains: list[str] | None, protect_super_experts: bool
) -> Ranking:
    from moe_surgery.selection.metrics import METRICS
    from moe_surgery.selection.rank import rank
    from moe_surgery.selection.statistics import load_statistics, merge

    if metric is None:
        raise UsageError(f"say how to rank: --metric {'|'.join(METRICS)}")
    statistics = merge(load_statistics(source) for source in sources)
    return rank(statistics, metric, domains=domains, protect_super_experts=protect_super_experts)


def _published(
    sources: tuple[Path, ...], experts: int | None, model_type: str | None, others: list[Path | None]
) -> tuple[Ranking, str]:
    from dataclasses import replace

    from moe_surgery.selection.published import rank_published, statistics_files

    files = [file for source in sources for file in statistics_files(source)]
    output, interleave_with = others
    check_new_output(output, [*files, interleave_with])
    return replace(rank_published(files, experts), model_type=model_type), f"{len(files)} files"
