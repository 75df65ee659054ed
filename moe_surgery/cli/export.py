"""moe-surgery export."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe_surgery.cli.options import OUTPUT, common, router_top_k, terminal_of, write_options
from moe_surgery.cli.terminal import Terminal, count, fetch_text, size

if TYPE_CHECKING:
    from moe_surgery.pipeline.exporting import ExportResult


@click.command("export")
@click.argument("ckpt")
@click.argument("out", type=OUTPUT)
@click.option(
    "--plan", "plan_file", type=click.Path(path_type=Path), help="Plan file; only its experts are written."
)
@router_top_k
@click.option(
    "--store",
    type=click.Choice(["keep", "mxfp4"]),
    default="keep",
    show_default=True,
    help="Format of expert weights in the output; mxfp4 is lossless for weights that came from MXFP4.",
)
@click.option(
    "--dense",
    type=click.Choice(["keep", "q8_0"]),
    default="keep",
    show_default=True,
    help="Format of dense matrices (attention, embedding, unembedding); q8_0, as in published gpt-oss GGUF files, "
    "takes half the bytes of BF16.",
)
@click.option("--name", help="Model name in the file; default: the checkpoint's folder.")
@click.option(
    "--tokenizer/--no-tokenizer",
    default=True,
    show_default=True,
    help="Include tokenizer and chat template.",
)
@click.option("--overwrite", is_flag=True, help="Replace existing output.")
@write_options
@common
@click.pass_context
def command(
    context: click.Context,
    ckpt: str,
    out: Path,
    plan_file: Path | None,
    top_k: int | None,
    store: str,
    dense: str,
    name: str | None,
    tokenizer: bool,
    dry_run: bool,
    overwrite: bool,
    ignore_free_space: bool,
    ignore_unlisted: bool,
) -> None:
    """Write a checkpoint as one GGUF file.

    The file is for llama.cpp, Ollama and LM Studio. CKPT may be full or pruned. Weights keep their
    format bit for bit (norms, biases and router become F32). CKPT is only read, never loaded; OUT
    appears complete or not at all. With --plan only the plan's experts are written.

    \b
    moe-surgery export example:tiny tiny.gguf
    moe-surgery export gpt-oss-law-8 gpt-oss-law-8.gguf
    moe-surgery export openai/gpt-oss-20b law-8.gguf --plan law-8.json
    moe-surgery export gpt-oss-law-8 small.gguf --dense q8_0
    """
    from moe_surgery.pipeline.exporting import export_gguf
    from moe_surgery.selection.plan import load_plan

    terminal = terminal_of(context)
    plan = None if plan_file is None else load_plan(plan_file)
    start = time.perf_counter()
    with terminal.job() as progress:
        result = export_gguf(
            ckpt,
            out,
            plan=plan,
            top_k=top_k,
            store=store,
            dense=dense,
            name=name,
            tokenizer=tokenizer,
            dry_run=dry_run,
            overwrite=overwrite,
            ignore_free_space=ignore_free_space,
            ignore_unlisted=ignore_unlisted,
            progress=progress,
            on_fetch=terminal.fetching,
        )
    seconds = time.perf_counter() - start
    if terminal.json:
        terminal.data(_as_dict(result, seconds))
        return
    _print(terminal, result, seconds)


def _as_dict(result: ExportResult, seconds: float) -> dict[str, object]:
    from dataclasses import asdict

    done = result.conversion
    converted = done is not None and done.blocks > 0
    return {
        "output": str(result.out),
        "seconds": seconds,
        **result.program.as_dict(),
        "bytes_to_fetch": result.fetch.nbytes if result.fetch else 0,
        "written": done is not None,
        "notes": result.notes,
        "conversion": {**asdict(done), "relative_error": done.relative_error} if done and converted else None,
    }


def _print(terminal: Terminal, result: ExportResult, seconds: float) -> None:
    program, conversion = result.program, result.conversion
    terminal.result(
        f"{'would write ' if conversion is None else ''}{result.out}: {program.experts} experts, "
        f"top-{program.top_k}, {count(program.parameters)} parameters, {size(program.nbytes)} in "
        f"{len(program.tensors)} tensors ({program.expert_format.label} experts, {program.dense_type} attention and "
        "embeddings)" + (f", {seconds:.1f} s" if conversion is not None else "")
    )
    if conversion is None:
        kinds = ", ".join(f"{kind} {size(nbytes)}" for kind, nbytes in program.bytes_by_type().items())
        terminal.result(f"{kinds}, header {size(len(program.header))}")
        if result.fetch:
            terminal.result(f"to fetch: {fetch_text(result.fetch)}")
    elif conversion.blocks:
        terminal.say(
            f"MXFP4: {conversion.inexact_blocks:,} of {conversion.blocks:,} blocks inexact, "
            f"relative error {conversion.relative_error:.3g}"
        )
    for note in result.notes:
        terminal.note(note)
    if program.tokens and not program.chat_template:
        terminal.say("note: the checkpoint has no chat template; programs will use a default")
