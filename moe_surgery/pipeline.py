"""Whole jobs, one function each: inspect, plan, prune, export."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.source import Folder
from moe_surgery.checkpoint.staging import stale_partials
from moe_surgery.errors import PlanMismatchError
from moe_surgery.families import FAMILIES, AnyFamily, identify_model
from moe_surgery.families.base import Family
from moe_surgery.families.identity import identity
from moe_surgery.families.model_spec import ModelSpec
from moe_surgery.progress import Counter, OnProgress
from moe_surgery.selection.arguments import PathLike
from moe_surgery.selection.plan import Plan, as_plan, check_top_k, plan_keeping
from moe_surgery.surgery.compiler import DEFAULT_SHARD_SIZE, compile_program
from moe_surgery.surgery.inspect import Inspection, inspect_checkpoint
from moe_surgery.surgery.mtp import mtp_notes
from moe_surgery.surgery.names import SOURCE_README_NAME
from moe_surgery.surgery.preflight import check_output, check_output_file
from moe_surgery.surgery.program import Program
from moe_surgery.surgery.provenance import origin_of
from moe_surgery.surgery.routing import check_routing
from moe_surgery.surgery.serving import serving_notes

if TYPE_CHECKING:
    from moe_surgery.export.program import GgufProgram
    from moe_surgery.formats.encode_report import EncodeReport
    from moe_surgery.selection.statistics import Statistics
    from moe_surgery.surgery.run import Outcome

__all__ = [
    "ExportResult",
    "PruneResult",
    "check_statistics",
    "export_gguf",
    "inspect",
    "make_plan",
    "prune",
]

log = logging.getLogger("moe_surgery")
PlanMaker = Callable[[ModelSpec], Plan]


@dataclass(frozen=True, slots=True)
class PruneResult:
    """The result of `prune`. `outcome` is None for a dry run; `notes` say what was ignored in the source and
    which limits of serving engines apply; `stale` are partial folders of other jobs, left untouched."""

    out: Path
    program: Program
    outcome: Outcome | None
    notes: tuple[str, ...]
    stale: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class ExportResult:
    """The result of `export_gguf`. `conversion` is the loss of conversion to MXFP4; None for a dry run. `notes`
    say what was ignored in the source."""

    out: Path
    program: GgufProgram
    conversion: EncodeReport | None
    notes: tuple[str, ...] = ()


def inspect(
    checkpoint: PathLike | Folder,
    *,
    ignore_unlisted: bool = False,
    families: tuple[AnyFamily, ...] = FAMILIES,
) -> Inspection:
    """Family, sizes and bytes of `checkpoint`, and its sizes with n = 1..E experts kept.

    Reads headers only. `families` are the model families to recognise.
    Raises InvalidInputError or OutputError.
    """
    with Checkpoint.open(checkpoint, ignore_unlisted=ignore_unlisted) as opened:
        return inspect_checkpoint(opened, identify_model(opened, families))


def make_plan(checkpoint: PathLike, choose: PlanMaker, *, families: tuple[AnyFamily, ...] = FAMILIES) -> Plan:
    """The plan that `choose` makes for the model in `checkpoint`, checked against it.

    Raises PlanMismatchError where it does not fit, and any error of opening the checkpoint.
    """
    with Checkpoint.open(checkpoint) as opened:
        model = identify_model(opened, families)
    plan = choose(model)
    plan.check_fits(model.model_type, model.experts, model.layers, str(checkpoint), model.layer_numbers)
    if plan.uniform_experts is not None:
        check_routing(model, plan, min(plan.top_k or model.top_k, plan.uniform_experts))
    return plan


def check_statistics(
    checkpoint: PathLike,
    statistics: Statistics | PathLike,
    *,
    families: tuple[AnyFamily, ...] = FAMILIES,
) -> None:
    """Raise PlanMismatchError unless `statistics` (or those in the file of that path) are of `checkpoint`."""
    from moe_surgery.selection.statistics import as_statistics

    statistics = as_statistics(statistics)
    with Checkpoint.open(checkpoint) as opened:
        actual = identity(opened, identify_model(opened, families))
    if statistics.identity != actual:
        raise PlanMismatchError(
            f"the statistics were made from another checkpoint ({statistics.identity}), not from "
            f"{checkpoint} ({actual}); run profile on this one"
        )


def prune(
    checkpoint: PathLike | Folder,
    out: PathLike,
    plan: Plan | PathLike | PlanMaker,
    *,
    top_k: int | None = None,
    store: str = "keep",
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    dry_run: bool = False,
    overwrite: bool = False,
    ignore_free_space: bool = False,
    ignore_unlisted: bool = False,
    card: bool = True,
    base_model: str | None = None,
    mtp: str | None = None,
    families: tuple[AnyFamily, ...] = FAMILIES,
    progress: OnProgress | None = None,
    ops: FileOps | None = None,
) -> PruneResult:
    """Write the experts of `checkpoint` that `plan` keeps as the new checkpoint folder `out`.

    `checkpoint` is a path, or a `Folder` of another source of bytes. `plan` is a `Plan`, the path of a
    plan file, or a function that makes a plan for the model; `top_k` replaces its number of experts a token,
    and may be more than the source's, up to the experts kept. `store`: "keep" copies expert weights
    unchanged; "bf16", "mxfp4", "f16" and "f32" convert them, each value
    rounded once to the nearest (see `moe_surgery.formats.convert`), and one too large for the format is
    refused. Other tensors keep their dtype. `max_shard_size` in bytes of tensors. `mtp`: "keep" (default) cuts
    layers for multi-token prediction to as many experts as the others, those with the largest router rows
    where the plan lists none; "drop" leaves these layers out.
    `card` writes a model card as README.md (a README.md of the source always becomes
    README.source.md); `base_model` is the source's id on the hub, where its path and files do not name it.
    `dry_run` stops before anything is written. `progress` is called with each `Progress`, in bytes of
    shards (written, or checked again after an interrupted run). `families` are the model families to
    recognise. `ops` is the table of system calls.

    `out` appears whole or not at all, and the source is only ever read. Raises UsageError,
    InvalidInputError, PlanMismatchError, OutputError or DiskFullError, each with one line that says
    what to do. After an interruption (KeyboardInterrupt or a kill) the same call resumes.
    """
    # Only prune needs these.
    from moe_surgery.card.card import with_card
    from moe_surgery.card.front_matter import read_readme

    with Checkpoint.open(checkpoint, ignore_unlisted=ignore_unlisted, ops=ops) as opened:
        model = identify_model(opened, families)
        chosen = (plan(model) if callable(plan) else as_plan(plan)).with_top_k(top_k)
        program = compile_program(opened, model, chosen, store=store, max_shard_size=max_shard_size, mtp=mtp)
        copied = program.copies.get(SOURCE_README_NAME)
        readme = read_readme(None if copied is None else opened.files.open(copied))
        origin = origin_of(opened, model, base_model=base_model, card_base_model=readme.base_model)
        program = replace(program, origin=origin)
        if card:
            program = with_card(program, model, readme)
        target = check_output(opened, out, overwrite=overwrite)
        log.info("reading %.2f GB from %d shards", program.bytes_read / 1e9, len(program.sources))
        outcome = None
        if not dry_run:
            from moe_surgery.surgery.run import run_program

            outcome = run_program(
                program,
                opened,
                target,
                overwrite=overwrite,
                ignore_free_space=ignore_free_space,
                progress=Counter(progress, "prune", program.nbytes, "bytes").advance,
                ops=ops,
            )
    notes = [
        *model.notes,
        *mtp_notes(model, program.plan),
        *serving_notes(
            chosen.uniform_experts or 0,
            program.top_k,
            model.top_k,
            chosen.top_k,
            expert_format=program.expert_format,
            gpt_oss=isinstance(model.family, Family),
            model_type=model.model_type,
        ),
    ]
    return PruneResult(target, program, outcome, tuple(notes), tuple(stale_partials(target)))


def export_gguf(
    checkpoint: PathLike | Folder,
    out: PathLike,
    *,
    plan: Plan | PathLike | None = None,
    top_k: int | None = None,
    store: str = "keep",
    name: str | None = None,
    tokenizer: bool = True,
    dry_run: bool = False,
    overwrite: bool = False,
    ignore_free_space: bool = False,
    ignore_unlisted: bool = False,
    families: tuple[AnyFamily, ...] = FAMILIES,
    progress: OnProgress | None = None,
    ops: FileOps | None = None,
) -> ExportResult:
    """Write `checkpoint`, with `plan` applied to it if given, as the GGUF file `out` for llama.cpp.

    `plan` is a `Plan` or the path of a plan file. `top_k` replaces the plan's or the model's number of
    experts a token, up to the experts that are kept. Weights keep their format and bits, norms and biases
    become F32; `store` "mxfp4" converts experts. `name` is the model's name in the file (default: from the path).
    `tokenizer` False leaves tokenizer and chat template out. `families` are the model families to
    recognise. `progress` is called with each `Progress`, in bytes of the file.

    `out` appears whole or not at all, and the source is only ever read. Raises UsageError,
    InvalidInputError, PlanMismatchError, OutputError or DiskFullError, each with one line that says
    what to do.
    """
    from moe_surgery.export.compiler import compile_gguf, default_name
    from moe_surgery.export.run import write_gguf
    from moe_surgery.export.tokenizer import find_tokenizer

    with Checkpoint.open(checkpoint, ignore_unlisted=ignore_unlisted, ops=ops) as opened:
        model = identify_model(opened, families)
        if plan is None and top_k is not None:
            check_top_k(top_k, model.experts, f"{checkpoint} has")
            plan = plan_keeping(None, model)
        chosen = None if plan is None else as_plan(plan).with_top_k(top_k)
        target = check_output_file(opened, out, overwrite=overwrite)
        program = compile_gguf(
            opened,
            model,
            find_tokenizer(opened, model) if tokenizer else None,
            plan=chosen,
            name=name or default_name(opened.path),
            store=store,
        )
        log.info("reading %.2f GB, a tokenizer of %d tokens", program.bytes_read / 1e9, program.tokens)
        conversion = None
        if not dry_run:
            conversion = write_gguf(
                program,
                opened,
                target,
                overwrite=overwrite,
                ignore_free_space=ignore_free_space,
                progress=Counter(progress, "export", program.nbytes, "bytes").advance,
                ops=ops,
            )
    return ExportResult(target, program, conversion, model.notes)
