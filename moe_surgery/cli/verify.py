"""moe-surgery verify."""

from __future__ import annotations

from dataclasses import asdict

import click

from moe_surgery.cli.options import common, terminal_of
from moe_surgery.cli.terminal import size
from moe_surgery.errors import VerificationError


@click.command("verify")
@click.argument("ckpt")
@click.option(
    "--source",
    metavar="CKPT",
    help="Checkpoint that this one was pruned from; every kept expert is compared with it, byte for byte.",
)
@click.option("--adapter", metavar="ADAPTER", help="The adapter that was merged; compare its tensors too.")
@click.option(
    "--structure-only", is_flag=True, help="Check headers, index, config and sizes only, no digests."
)
@click.option("--weights-only", is_flag=True, help="Report edited files other than the weights as notes.")
@common
@click.pass_context
def command(
    context: click.Context,
    ckpt: str,
    source: str | None,
    adapter: str | None,
    structure_only: bool,
    weights_only: bool,
) -> None:
    """Check that a checkpoint is complete and undamaged.

    Compares headers, index and config with one another, and the digest of every file and tensor with
    the manifest (surgery.json): a single flipped byte is found and named. Damage that was already
    in the source cannot be detected. Exit code 8 if there is a problem.

    Edited files other than the weights (README.md, config.json, tokenizer) are reported separately from
    damaged weights; they also give exit code 8, unless --weights-only makes them notes. Added files
    (.gitattributes, .git, .cache) are notes; added shards are problems.

    A GGUF file is compared with OUT.surgery.json next to it (prune --manifest), and with --source tensor by tensor
    and key by key. Without either only its structure is checked, and a flipped byte in a weight is not found.

    \b
    moe-surgery verify tiny-8 --source example:tiny
    moe-surgery verify law-8
    moe-surgery verify law-8 --source openai/gpt-oss-20b
    moe-surgery verify law-8-merged --source law-8 --adapter my-adapter
    moe-surgery verify law-8-with-my-readme --weights-only
    moe-surgery verify some-downloaded-model --structure-only
    moe-surgery verify out.gguf --source Model-Q4_K_M-00001-of-00003.gguf
    """
    from moe_surgery.checkpoint.files import printable_path
    from moe_surgery.checkpoint.text import printable
    from moe_surgery.surgery.verify import verify_checkpoint

    terminal = terminal_of(context)
    if structure_only and source:
        raise click.UsageError("--source compares bytes and --structure-only reads none; choose one")
    with terminal.job() as progress:
        result = verify_checkpoint(
            ckpt,
            source=source,
            adapter=adapter,
            structure_only=structure_only,
            weights_only=weights_only,
            progress=progress,
        )
    if terminal.json:
        terminal.data({"output": ckpt, "ok": result.ok, **asdict(result)})
    for note in result.notes:
        terminal.note(note)
    if not result.ok:
        problems = list(result.problems)
        if result.weights_ok:
            sides = ", ".join(map(printable, result.side_files))
            problems.append(
                f"{printable_path(ckpt)}: the weights are intact, only {sides} changed; --weights-only accepts that"
            )
        *others, last = problems
        for problem in others:
            terminal.error(problem)
        raise VerificationError(last)
    if not terminal.json:
        read = "structure only" if structure_only else f"{size(result.bytes_read)} read"
        terminal.result(f"{ckpt}: OK ({result.files} files, {result.tensors} tensors, {read})")
