"""moe-surgery rank."""

from __future__ import annotations

from pathlib import Path

import click

from moe_surgery.cli.options import check_new_output, common, terminal_of


@click.command("rank")
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--interleave-with",
    type=click.Path(path_type=Path),
    help="Take alternately from this ranking too, as the published topic rankings do.",
)
@click.option("--model-type", help="The model type to record: the statistics do not say it.")
@click.option(
    "--experts", "-n", type=int, help="The model's number of experts, where the statistics leave some out."
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write the ranking here, not to stdout."
)
@common
@click.pass_context
def command(
    context: click.Context,
    sources: tuple[Path, ...],
    interleave_with: Path | None,
    model_type: str | None,
    experts: int | None,
    output: Path | None,
) -> None:
    """Order the experts of every layer by how often they were chosen.

    SOURCES are folders of the published statistics tree (<dataset>/<category>/<outcome>.json), or
    single files of it. The ranking is the published one for the same files, and goes to `plan` or
    `prune --ranking`.

    \b
    moe-surgery rank activations/ -o all.json --model-type gpt_oss
    moe-surgery rank activations/mmlu_test/professional_law --interleave-with all.json -o law.json
    """
    from dataclasses import replace

    from moe_surgery.checkpoint.fileops import FileOps
    from moe_surgery.checkpoint.writer import write_file
    from moe_surgery.selection.published import interleave, rank_published, statistics_files
    from moe_surgery.selection.ranking import load_ranking

    terminal = terminal_of(context)
    files = [file for source in sources for file in statistics_files(source)]
    check_new_output(output, [*files, interleave_with])
    ranking = replace(rank_published(files, experts), model_type=model_type)
    if interleave_with is not None:
        ranking = interleave(ranking, load_ranking(interleave_with))
    if output is None:
        click.echo(ranking.to_json())
        return
    write_file(output, ranking.to_json().encode() + b"\n", FileOps())
    if terminal.json:
        terminal.data({"output": str(output), "files": len(files), "layers": ranking.layers})
    terminal.say(
        f"{output}: {len(ranking.layers)} layers of {ranking.num_experts} experts, from {len(files)} files"
    )
