"""moe-surgery card."""

from __future__ import annotations

from pathlib import Path

import click

from moe_surgery.cli.options import OUTPUT, base_model_option, check_new_output, common, terminal_of
from moe_surgery.errors import UsageError


@click.command("card")
@click.argument("ckpt")
@click.option(
    "--evaluation",
    type=click.Path(path_type=Path),
    help="Evaluation file to show; must include this checkpoint.",
)
@base_model_option
@click.option("--license", metavar="ID", help="Licence identifier (apache-2.0); default: the source's.")
@click.option("-o", "--output", type=OUTPUT, help="Write the card here; default: stdout.")
@click.option(
    "--write", is_flag=True, help="Write the card to CKPT's README.md and record it in the manifest."
)
@click.option(
    "--overwrite", is_flag=True, help="Replace existing output: with --write, a README.md edited by hand."
)
@common
@click.pass_context
def command(
    context: click.Context,
    ckpt: str,
    evaluation: Path | None,
    base_model: str | None,
    license: str | None,
    output: Path | None,
    write: bool,
    overwrite: bool,
) -> None:
    """Make the model card of a pruned checkpoint.

    CKPT is a folder written by `prune`. The card, with the metadata that the hub reads, is made from its
    manifest (surgery.json) and headers. `prune` already writes this card as README.md; --write replaces
    it, for example with evaluation figures, and keeps `verify` passing.

    \b
    moe-surgery card tiny-8
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
        raise UsageError("choose one of --write and -o: --write writes CKPT's README.md")
    if overwrite and not write:
        raise UsageError("--overwrite needs --write")
    check_new_output(output, [evaluation])
    if output is not None and output.parent.exists() and output.parent.samefile(resolve(ckpt)):
        raise UsageError(
            f"-o {output}: is in the checkpoint; use --write, which updates README.md and manifest together"
        )
    figures = None if evaluation is None else load_evaluation(evaluation)
    text = make_card(ckpt, evaluation=figures, base_model=base_model, license=license)
    path = output
    if write:
        path = write_card(ckpt, text, overwrite=overwrite)
    elif output is not None:
        write_file(output, text.encode(), FileOps())
    if terminal.json:
        terminal.data({"output": None if path is None else str(path), "card": text})
    elif path is None:
        click.echo(text.encode(), nl=False)  # UTF-8 in any locale
    else:
        terminal.result(f"{path}: model card, {len(text.splitlines())} lines")
