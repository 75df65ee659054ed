"""moe-surgery card."""

from __future__ import annotations

from pathlib import Path

import click

from moe_surgery.cli.options import OUTPUT, check_new_output, common, terminal_of
from moe_surgery.errors import UsageError


@click.command("card")
@click.argument("out")
@click.option(
    "--evaluation", type=click.Path(path_type=Path), help="Show the figures of this evaluation of OUT."
)
@click.option("--base-model", metavar="ID", help="The source's id on the hub, instead of what is recorded.")
@click.option("--license", metavar="L", help="The licence's identifier, instead of what the source says.")
@click.option("-o", "--output", type=OUTPUT, help="Write the card here, not to stdout.")
@click.option("--write", is_flag=True, help="Make it the README.md of OUT, and list it in the manifest.")
@click.option("--overwrite", is_flag=True, help="With --write: replace a README.md that was changed by hand.")
@common
@click.pass_context
def command(
    context: click.Context,
    out: str,
    evaluation: Path | None,
    base_model: str | None,
    license: str | None,
    output: Path | None,
    write: bool,
    overwrite: bool,
) -> None:
    """Make the model card of a pruned checkpoint.

    OUT is a folder that `prune` wrote: the card comes from its manifest (surgery.json) and headers,
    with the metadata that the hub reads. `prune` writes the same card as README.md; --write replaces
    it, with an evaluation perhaps, and `verify` holds afterwards.

    \b
    moe-surgery card law-8
    moe-surgery card law-8 --base-model openai/gpt-oss-20b --evaluation law.evaluation.json --write
    """
    from moe_surgery.card.card import make_card
    from moe_surgery.card.write import write_card
    from moe_surgery.checkpoint.fileops import FileOps
    from moe_surgery.checkpoint.resolve import resolve
    from moe_surgery.checkpoint.writer import write_file
    from moe_surgery.quality.evaluation import load_evaluation

    terminal = terminal_of(context)
    if write and output is not None:
        raise UsageError("--write and -o exclude each other: --write means README.md of OUT")
    if overwrite and not write:
        raise UsageError("--overwrite goes with --write")
    check_new_output(output, [evaluation])
    if output is not None and output.parent.exists() and output.parent.samefile(resolve(out)):
        raise UsageError(
            f"-o {output}: is in the checkpoint; --write changes its README.md and manifest together"
        )
    figures = None if evaluation is None else load_evaluation(evaluation)
    text = make_card(out, evaluation=figures, base_model=base_model, license=license)
    path = output
    if write:
        path = write_card(out, text, overwrite=overwrite)
    elif output is not None:
        write_file(output, text.encode(), FileOps())
    if terminal.json:
        terminal.data({"output": None if path is None else str(path), "card": text})
    elif path is None:
        click.echo(text.encode(), nl=False)  # UTF-8 wherever it goes
    else:
        terminal.result(f"{path}: model card, {len(text.splitlines())} lines")
