"""moe-surgery merge."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe_surgery.cli.options import OUTPUT, SIZE, base_model_option, common, terminal_of, write_options
from moe_surgery.cli.terminal import Terminal, count, fetch_text, size
from moe_surgery.formats.expert_format import EXPERT_DTYPES

if TYPE_CHECKING:
    from moe_surgery.pipeline.merging import MergeResult


@click.command("merge")
@click.argument("adapter")
@click.argument("ckpt")
@click.argument("out", type=OUTPUT)
@click.option(
    "--store",
    type=click.Choice(EXPERT_DTYPES),
    default="keep",
    show_default=True,
    help="Format of expert weights in the output; MXFP4 may be too coarse for a small update, which a note says.",
)
@click.option(
    "--numbering",
    type=click.Choice(["auto", "checkpoint", "source"]),
    default="auto",
    show_default=True,
    help="Whose expert numbers ADAPTER has: CKPT's, or those of the model that CKPT was pruned from.",
)
@click.option(
    "--rank-order",
    type=click.Choice(["peft", "expert"]),
    default="peft",
    show_default=True,
    help="Rank axis of lora_B on stacked experts: PEFT's order, or the ranks of one expert next to each other (Unsloth "
    "before September 2026).",
)
@click.option(
    "--max-shard-size", type=SIZE, default="5GB", show_default=True, help="Maximum tensor bytes per file."
)
@click.option(
    "--overwrite", is_flag=True, help="Replace existing output; only a checkpoint that moe-surgery wrote."
)
@write_options
@click.option(
    "--card/--no-card", default=True, show_default=True, help="Write a model card as OUT's README.md."
)
@base_model_option
@common
@click.pass_context
def command(
    context: click.Context,
    adapter: str,
    ckpt: str,
    out: Path,
    store: str,
    numbering: str,
    rank_order: str,
    max_shard_size: int,
    dry_run: bool,
    overwrite: bool,
    ignore_free_space: bool,
    ignore_unlisted: bool,
    card: bool,
    base_model: str | None,
) -> None:
    """Write a checkpoint with a LoRA adapter added to its weights.

    ADAPTER is a folder that PEFT saved, or an adapter on the hub: updates of attention, routers, dense layers,
    single experts or stacked experts. CKPT is only read, never loaded, and one expert at a time is in memory.
    Weights become W + scale * B @ A, in float32, rounded once. An adapter made for the model before it was pruned is
    merged into the experts that are left. What cannot be merged is an error that names it.

    \b
    moe-surgery merge tiny-lora example:tiny tiny-merged
    moe-surgery merge my-adapter openai/gpt-oss-20b merged --store bf16
    moe-surgery merge my-adapter law-8 law-8-merged --dry-run
    """
    from moe_surgery.pipeline.merging import merge_adapter

    terminal = terminal_of(context)
    start = time.perf_counter()
    if not dry_run:
        terminal.after_interrupt = "; the same command resumes where it stopped"
    with terminal.job() as progress:
        result = merge_adapter(
            adapter,
            ckpt,
            out,
            store=store,
            numbering=numbering,
            rank_order=rank_order,
            max_shard_size=max_shard_size,
            dry_run=dry_run,
            overwrite=overwrite,
            ignore_free_space=ignore_free_space,
            ignore_unlisted=ignore_unlisted,
            card=card,
            base_model=base_model,
            progress=progress,
            on_fetch=terminal.fetching,
        )
    seconds = time.perf_counter() - start
    if terminal.json:
        terminal.data(_as_dict(result, seconds))
        return
    if result.outcome is None:
        _print_program(terminal, result)
    else:
        _print_outcome(terminal, result, seconds)
    for note in result.notes:
        terminal.note(note)
    terminal.unfinished(result.stale)


def _as_dict(result: MergeResult, seconds: float) -> dict[str, object]:
    from dataclasses import asdict

    return {
        "output": str(result.out),
        "seconds": seconds,
        **result.program.as_dict(),
        "adapter": result.adapter,
        "bytes_to_fetch": result.fetch.nbytes if result.fetch else 0,
        "outcome": asdict(result.outcome) if result.outcome else None,
        "notes": result.notes,
        "stale_partial_folders": [str(p) for p in result.stale],
    }


def _print_program(terminal: Terminal, result: MergeResult) -> None:
    program = result.program
    merged = set(result.tensors)
    rows = [
        [s.name, str(len(s.tensors)), str(sum(t.name in merged for t in s.tensors)), size(s.nbytes)]
        for s in program.shards
    ]
    rows.append(["total", "", str(len(merged)), size(program.nbytes)])
    terminal.table(f"would write {result.out}", ["shard", "tensors", "merged", "written"], rows)
    if result.fetch:
        terminal.result(f"to fetch: {fetch_text(result.fetch)}")
    terminal.result("other files: " + ", ".join([*program.texts, *program.copies, "surgery.json"]))


def _print_outcome(terminal: Terminal, result: MergeResult, seconds: float) -> None:
    program, outcome = result.program, result.outcome
    assert outcome is not None
    terminal.result(
        f"{result.out}: {result.adapter['name']} merged into {len(result.tensors)} tensors, "
        f"{count(program.parameters)} parameters, {size(program.nbytes)} in {len(program.shards)} "
        f"{'shard' if len(program.shards) == 1 else 'shards'} ({program.expert_format.label} experts), {seconds:.1f} s"
    )
    if outcome.shards_resumed:
        terminal.say(
            f"resumed: kept {len(outcome.shards_resumed)} finished shards ({size(outcome.bytes_resumed)})"
        )
    if outcome.conversion:
        lost = outcome.conversion
        update = f", {lost['update_error']:.3g} of the update" if "update_error" in lost else ""
        terminal.say(
            f"MXFP4: {lost['inexact_blocks']:,} of {lost['blocks']:,} blocks inexact, "
            f"relative error {lost['relative_error']:.3g}{update}"
        )
