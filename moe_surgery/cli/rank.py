"""moe-surgery rank."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe_surgery.cli.options import OUTPUT, check_new_output, common, ranked, terminal_of
from moe_surgery.errors import UsageError
from moe_surgery.selection.shipped import RANKINGS

if TYPE_CHECKING:
    from moe_surgery.selection.ranking import Ranking


@click.command("rank")
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@ranked
@click.option(
    "--interleave-with",
    type=click.Path(path_type=Path),
    help="Second ranking to interleave with, position by position, as in the published topic rankings.",
)
@click.option(
    "--topic",
    type=click.Choice(RANKINGS),
    help="Remake the published ranking of this topic from the whole published tree.",
)
@click.option("--model-type", help="Model type to record (gpt_oss); for published statistics, which lack it.")
@click.option(
    "--num-experts",
    type=int,
    help="Number of experts in the model, if the published statistics leave some out.",
)
@click.option("-o", "--output", type=OUTPUT, help="Write the ranking here; default: stdout.")
@common
@click.pass_context
def command(
    context: click.Context,
    sources: tuple[Path, ...],
    metric: str | None,
    domains: tuple[str, ...],
    protect_super_experts: bool,
    interleave_with: Path | None,
    topic: str | None,
    model_type: str | None,
    num_experts: int | None,
    output: Path | None,
) -> None:
    """Rank the experts of every layer, best first.

    SOURCES are statistics files written by `profile` or `stats import`, ranked by --metric over all domains or
    those named with --domain; or folders and files of the published statistics (<dataset>/<category>/<outcome>.json),
    ranked by frequency with the published formula. With --topic the one source is the root of the
    published tree: the topic's folders are ranked and interleaved with the ranking of the whole tree,
    which gives the published ranking (also available as published:NAME).

    \b
    frequency      how many tokens chose the expert
    gate           sum of its routing weights
    ean_sum        sum of its output norms         ean_mean   their mean
    weighted_ean   sum of weight times norm        reap       its mean (arXiv 2510.13999)
    ean_ca         norm of its mean output
    rms_count      tokens that chose it times the RMS of its down projection's input    (importance matrices only)
    energy         its output's squared norm, summed, as far as a matrix and weights tell   (likewise)

    \b
    moe-surgery rank tiny.stats --metric reap --domain code -o code-ranking.json
    moe-surgery rank activations/ -o all.json --model-type gpt_oss
    moe-surgery rank activations/ --topic law -o law.json --model-type gpt_oss
    moe-surgery rank activations/mmlu_test/professional_law --interleave-with published:all -o law.json
    """
    from moe_surgery.checkpoint.fileops import FileOps
    from moe_surgery.checkpoint.files import is_safetensors
    from moe_surgery.checkpoint.kinds import PUBLISHED_STATISTICS, STATISTICS, check_kind
    from moe_surgery.checkpoint.writer import write_file
    from moe_surgery.selection.published import TREE_FILES, interleave
    from moe_surgery.selection.ranking import load_ranking

    terminal = terminal_of(context)
    for source in sources:
        check_kind(source, "a statistics file", STATISTICS, PUBLISHED_STATISTICS)
    ours = [source for source in sources if is_safetensors(source)]
    if ours and len(ours) < len(sources):
        other = next(source for source in sources if source not in ours)
        raise UsageError(f"{other}: is not a statistics file but {ours[0]} is; rank the two kinds separately")
    if ours:
        if model_type is not None or num_experts is not None:
            raise UsageError(
                "--model-type and --num-experts are for published statistics; files of `profile` have both"
            )
        if topic is not None:
            raise UsageError("--topic is for the published tree; for files of `profile` use --domain")
        check_new_output(output, [*sources, interleave_with])
        ranking = _rank_statistics(sources, metric, domains, protect_super_experts)
        origin = f"{len(sources)} statistics {'file' if len(sources) == 1 else 'files'}"
    else:
        if metric not in (None, "frequency") or domains or protect_super_experts:
            raise UsageError(
                "published statistics are ranked by frequency only; --metric, --domain and "
                "--protect-super-experts need files of `profile`"
            )
        if topic is not None and (len(sources) > 1 or interleave_with is not None):
            raise UsageError(
                "--topic takes one source, the root of the published tree, and no --interleave-with"
            )
        ranking, files = _rank_published(sources, topic, num_experts, model_type, [output, interleave_with])
        origin = f"{files} files"
        if topic is not None and files != TREE_FILES:
            terminal.say(
                f"note: the published tree has {TREE_FILES} files, {sources[0]} has {files}: "
                "this is not the published ranking"
            )
    if interleave_with is not None:
        ranking = interleave(ranking, load_ranking(interleave_with))
    if output is None:
        click.echo(ranking.to_json())
        return
    write_file(output, ranking.to_json().encode() + b"\n", FileOps())
    if terminal.json:
        terminal.data({"output": str(output), "layers": ranking.layers, "provenance": ranking.provenance})
    terminal.say(f"{output}: {len(ranking.layers)} layers of {ranking.num_experts} experts, from {origin}")


def _rank_statistics(
    sources: tuple[Path, ...], metric: str | None, domains: tuple[str, ...], protect_super_experts: bool
) -> Ranking:
    from moe_surgery.selection.metrics import metrics_from
    from moe_surgery.selection.rank import rank
    from moe_surgery.selection.statistics import load_statistics, merge

    statistics = merge(load_statistics(source) for source in sources)
    if metric is None:
        raise UsageError(f"choose how to rank: --metric {'|'.join(metrics_from(statistics.known))}")
    return rank(statistics, metric, domains=domains or None, protect_super_experts=protect_super_experts)


def _rank_published(
    sources: tuple[Path, ...],
    topic: str | None,
    experts: int | None,
    model_type: str | None,
    others: list[Path | None],
) -> tuple[Ranking, int]:
    """The ranking, and the number of files below `sources`."""
    from dataclasses import replace

    from moe_surgery.selection.published import rank_published, rank_topic, statistics_files

    files = [file for source in sources for file in statistics_files(source)]
    output, interleave_with = others
    check_new_output(output, [*files, interleave_with])
    ranking = rank_published(files, experts) if topic is None else rank_topic(sources[0], topic, experts)
    return replace(ranking, model_type=model_type), len(files)
