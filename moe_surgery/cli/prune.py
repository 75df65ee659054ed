"""moe-surgery prune."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moe_surgery.cli.keep import by_imatrix, first_of, imatrix_options, keep_options, keeping
from moe_surgery.cli.options import (
    OUTPUT,
    SIZE,
    base_model_option,
    check_new_output,
    common,
    metric_option,
    router_top_k,
    terminal_of,
    write_options,
)
from moe_surgery.cli.terminal import Terminal, count, fetch_text, size
from moe_surgery.errors import UsageError
from moe_surgery.formats.expert_format import EXPERT_DTYPES

if TYPE_CHECKING:
    from moe_surgery.families.model_spec import ModelSpec
    from moe_surgery.pipeline.pruning import PruneResult
    from moe_surgery.selection.plan import Plan


@click.command("prune")
@click.argument("ckpt")
@click.argument("out", type=OUTPUT)
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="Plan file; its experts are kept.")
@click.option(
    "--ranking",
    type=click.Path(path_type=Path),
    help="Ranking file or published:NAME (see plan); needs --experts.",
)
@imatrix_options
@metric_option
@click.option(
    "--cut-imatrix",
    type=OUTPUT,
    help="Also write the --imatrix of the pruned model here (GGUF), as llama-quantize needs to quantise it.",
)
@keep_options
@router_top_k
@click.option(
    "--store",
    type=click.Choice(EXPERT_DTYPES),
    default="keep",
    show_default=True,
    help="Format of expert weights in the output; mxfp4 is lossless for weights that came from MXFP4.",
)
@click.option(
    "--max-shard-size",
    type=SIZE,
    help="Maximum tensor bytes per file; default: 5GB, and one file for GGUF.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace existing output: a checkpoint that moe-surgery wrote, or any GGUF file.",
)
@click.option(
    "--manifest/--no-manifest",
    default=None,
    help="Write OUT.surgery.json next to a GGUF file, with digests for verify; default: no. A folder always has "
    "surgery.json.",
)
@write_options
@click.option(
    "--card/--no-card", default=True, show_default=True, help="Write a model card as OUT's README.md."
)
@click.option(
    "--mtp",
    type=click.Choice(["keep", "drop"]),
    help="Layers for multi-token prediction: cut to as many experts as the others, those with the largest router rows "
    "unless the plan lists them (keep), or left out (drop); default: keep.",
)
@base_model_option
@common
@click.pass_context
def command(
    context: click.Context,
    ckpt: str,
    out: Path,
    plan_file: Path | None,
    ranking: Path | None,
    imatrix: tuple[Path, ...],
    allow_missing: bool,
    metric: str | None,
    cut_imatrix: Path | None,
    experts: int | None,
    kept: list[int] | str | None,
    top_k: int | None,
    store: str,
    max_shard_size: int | None,
    order: str,
    dry_run: bool,
    overwrite: bool,
    manifest: bool | None,
    ignore_free_space: bool,
    ignore_unlisted: bool,
    card: bool,
    base_model: str | None,
    mtp: str | None,
) -> None:
    """Write a smaller checkpoint with only some of the experts.

    CKPT, a checkpoint of any supported family (docs/families.md), is only read, never loaded: bytes go straight
    from its files to OUT, in less than 100 MB of memory at any size (300 MB if --store converts). OUT appears
    complete or not at all. Stop it at any time; the same command resumes where it stopped. Of a model on the
    hub that is not in the local cache, only the bytes of the kept experts are fetched.

    Choose experts with exactly one of --plan, --ranking, --imatrix and --keep. `--keep all` keeps them all, to change
    only the format (--store) or the experts per token (--top-k). --imatrix ranks by importance matrices of llama.cpp;
    --metric is then rms_count (the default), frequency or energy (see rank).

    A GGUF file becomes a smaller GGUF file, whatever its architecture and quantisation: its bytes are cut as they
    lie, nothing is dequantised. Pass the first file of a set, or a file on the hub by its path or the end of its name:
    owner/name:Q4_K_M. OUT ends in .gguf; with --max-shard-size it becomes a set as llama.cpp names them.

    \b
    moe-surgery prune example:tiny tiny-8 --keep 0-7
    moe-surgery prune openai/gpt-oss-20b law-8 --ranking published:law --experts 8
    moe-surgery prune openai/gpt-oss-20b general-16 --imatrix imatrix.gguf --experts 16
    moe-surgery prune example:tiny tiny-16-top-2 --keep 0-15 --top-k 2
    moe-surgery prune some/pruned-bf16-model smaller --keep all --store mxfp4
    moe-surgery prune Model-Q4_K_M-00001-of-00003.gguf out.gguf --imatrix imatrix.gguf --experts 64
    moe-surgery prune unsloth/Qwen3-30B-A3B-GGUF:Q4_K_M out.gguf --ranking ranking.json --experts 64
    """
    from moe_surgery.pipeline.pruning import prune

    terminal = terminal_of(context)
    if cut_imatrix is not None:
        if not imatrix:
            raise UsageError("--cut-imatrix needs --imatrix")
        check_new_output(cut_imatrix, imatrix)
    choose = _plan_maker(plan_file, ranking, experts, kept, order, imatrix, cut_imatrix is not None)
    if choose is not None and (metric is not None or allow_missing):
        raise UsageError("--metric and --allow-missing are for choosing experts by --imatrix")
    start = time.perf_counter()
    if not dry_run:
        terminal.after_interrupt = "; the same command resumes where it stopped"
    with terminal.job() as progress:
        if choose is None:
            assert experts is not None
            choose = by_imatrix(imatrix, ckpt, experts, order, metric, allow_missing, progress)
        result = prune(
            ckpt,
            out,
            choose,
            top_k=top_k,
            store=store,
            max_shard_size=max_shard_size,
            dry_run=dry_run,
            overwrite=overwrite,
            ignore_free_space=ignore_free_space,
            ignore_unlisted=ignore_unlisted,
            card=card,
            base_model=base_model,
            mtp=mtp,
            manifest=manifest,
            progress=progress,
            on_fetch=terminal.fetching,
        )
        if cut_imatrix is not None and not dry_run:
            from moe_surgery.selection.imatrix.models import cut_for_plan

            cut_for_plan(list(imatrix), ckpt, result.program.plan, cut_imatrix)
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


def _plan_maker(
    plan_file: Path | None,
    ranking: Path | None,
    experts: int | None,
    kept: list[int] | str | None,
    order: str,
    imatrix: tuple[Path, ...] = (),
    cut: bool = False,
) -> Plan | Callable[[ModelSpec], Plan] | None:
    """None where the importance matrix chooses; with `cut` it may also only be cut by another choice."""
    given = (plan_file is not None) + (ranking is not None) + (kept is not None)
    if given > 1 or (given == 0 and not imatrix) or (given and imatrix and not cut):
        raise UsageError("choose experts with exactly one of --plan, --ranking, --imatrix and --keep")
    by_rank = ranking is not None or not given
    if by_rank != (experts is not None):
        named = "--ranking or --imatrix" if imatrix else "--ranking"
        raise UsageError(f"{named} and --experts need each other: the best N of every layer are kept")
    if not by_rank and order != "ascending":
        raise UsageError("--order needs --ranking or --imatrix: a plan or list already has an order")
    if not given:
        return None
    if plan_file is not None:
        from moe_surgery.selection.plan import load_plan

        return load_plan(plan_file)
    if kept is not None:
        return keeping(kept)
    assert ranking is not None
    assert experts is not None
    from moe_surgery.selection.ranking import load_ranking

    return first_of(load_ranking(ranking), experts, order)


def _as_dict(result: PruneResult, seconds: float) -> dict[str, object]:
    from dataclasses import asdict

    return {
        "output": str(result.out),
        "seconds": seconds,
        **result.program.as_dict(),
        "bytes_to_fetch": result.fetch.nbytes if result.fetch else 0,
        "outcome": asdict(result.outcome) if result.outcome else None,
        "notes": result.notes,
        "stale_partial_folders": [str(p) for p in result.stale],
    }


def _print_program(terminal: Terminal, result: PruneResult) -> None:
    from moe_surgery.surgery.program import Program

    program = result.program
    rows = [[s.name, str(len(s.tensors)), size(s.bytes_read), size(s.nbytes)] for s in program.shards]
    rows.append(["total", "", size(program.bytes_read), size(program.nbytes)])
    terminal.table(f"would write {result.out}", ["shard", "tensors", "read", "written"], rows)
    if result.fetch:
        terminal.result(f"to fetch: {fetch_text(result.fetch)}")
    if isinstance(program, Program):
        terminal.result("other files: " + ", ".join([*program.texts, *program.copies, "surgery.json"]))


def _print_outcome(terminal: Terminal, result: PruneResult, seconds: float) -> None:
    program, outcome = result.program, result.outcome
    assert outcome is not None
    kept = program.plan.uniform_experts
    terminal.result(
        f"{result.out}: {kept} of {program.plan.num_source_experts} experts, top-{program.top_k}, "
        f"{count(program.parameters)} parameters, {size(program.nbytes)} in {len(program.shards)} "
        f"{'shard' if len(program.shards) == 1 else 'shards'} ({program.expert_format.label} experts), {seconds:.1f} s"
    )
    if outcome.shards_resumed:
        terminal.say(
            f"resumed: kept {len(outcome.shards_resumed)} finished shards ({size(outcome.bytes_resumed)})"
        )
    elif outcome.bytes_resumed:
        terminal.say(f"resumed: kept {size(outcome.bytes_resumed)} of an unfinished file")
    if outcome.bytes_shared:
        terminal.say(f"{size(outcome.bytes_shared)} share their disk blocks with the source (reflink)")
    if outcome.conversion:
        lost = outcome.conversion
        terminal.say(
            f"MXFP4: {lost['inexact_blocks']:,} of {lost['blocks']:,} blocks inexact, "
            f"relative error {lost['relative_error']:.3g}"
        )
