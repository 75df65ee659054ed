"""moe-surgery verify."""

from __future__ import annotations

from dataclasses import asdict

import click

from moe_surgery.cli.options import common, terminal_of
from moe_surgery.cli.terminal import size
from moe_surgery.errors import VerificationError


@click.command("verify")
@click.argument("out")
@click.option("--source", metavar="CKPT", help="Also compare every kept slice with this checkpoint's bytes.")
@click.option("--structure-only", is_flag=True, help="Headers, index, config and sizes only: no digests.")
@click.option("--weights-only", is_flag=True, help="Edited files beside the weights are notes, not problems.")
@common
@click.pass_context
def command(
    context: click.Context, out: str, source: str | None, structure_only: bool, weights_only: bool
) -> None:
    """Check that a checkpoint is complete and undamaged.

    Compares headers, index and config with one another, and the digest of every file and tensor
    with the manifest (surgery.json): one flipped byte anywhere is found and named. Damage that was
    in the source before the surgery cannot be seen. Exit code 8 if there is a problem.

    Files beside the shards (README.md, config.json, tokenizer) that were edited are reported separately from
    weights; that too is exit code 8, unless --weights-only makes it a note. Files that were added
    (.gitattributes, .git, .cache) are a note, added shards are not.

    \b
    moe-surgery verify tiny-8 --source example:tiny
    moe-surgery verify law-8
    moe-surgery verify law-8 --source openai/gpt-oss-20b
    moe-surgery verify law-8-with-my-readme --weights-only
    moe-surgery verify some-downloaded-model --structure-only
    """
    from moe_surgery.checkpoint.files import printable_path
    from moe_surgery.checkpoint.text import printable
    from moe_surgery.surgery.verify import verify_checkpoint

    terminal = terminal_of(context)
    if structure_only and source:
        raise click.UsageError("--source compares bytes, --structure-only reads none; choose one")
    with terminal.job() as progress:
        found = verify_checkpoint(
            out,
            source=source,
            structure_only=structure_only,
            weights_only=weights_only,
            progress=progress,
        )
    if terminal.json:
        terminal.data({"output": out, "ok": found.ok, **asdict(found)})
    for note in found.notes:
        terminal.note(note)
    if not found.ok:
        problems = list(found.problems)
        if found.weights_ok:
            sides = ", ".join(map(printable, found.side_files))
            problems.append(
                f"{printable_path(out)}: the weights are sound, only {sides} changed; --weights-only accepts that"
            )
        *others, last = problems
        for problem in others:
            terminal.error(problem)
        raise VerificationError(last)
    if not terminal.json:
        read = "structure only" if structure_only else f"{size(found.bytes_read)} read"
        terminal.result(f"{out}: sound ({found.files} files, {found.tensors} tensors, {read})")
