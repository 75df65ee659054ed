"""`prune`: a plan, its program, the card, and the run."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_surgery.card.source_card import read_readme
from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.gguf.resolve import is_gguf
from moe_surgery.checkpoint.source import Folder
from moe_surgery.checkpoint.staging import stale_partials
from moe_surgery.engine.fetch import Fetch, OnFetch, to_fetch
from moe_surgery.errors import UsageError
from moe_surgery.families import FAMILIES, AnyFamily, identify_model
from moe_surgery.families.base import Family
from moe_surgery.families.model_spec import ModelSpec
from moe_surgery.pipeline.planning import PlanMaker
from moe_surgery.progress import Counter, OnProgress
from moe_surgery.selection.arguments import PathLike
from moe_surgery.selection.plan import Plan, as_plan
from moe_surgery.surgery.compiler import DEFAULT_SHARD_SIZE, compile_program
from moe_surgery.surgery.mtp import mtp_notes
from moe_surgery.surgery.names import SOURCE_README_NAME
from moe_surgery.surgery.preflight import check_output
from moe_surgery.surgery.program import Program
from moe_surgery.surgery.provenance import origin_of
from moe_surgery.surgery.repaired import Repair, with_repair
from moe_surgery.surgery.serving import serving_notes

if TYPE_CHECKING:
    from moe_surgery.surgery.gguf.program import GgufPruneProgram
    from moe_surgery.surgery.run import Outcome

__all__ = ["PruneResult", "prune", "prune_program"]

log = logging.getLogger("moe_surgery")


@dataclass(frozen=True, slots=True)
class PruneResult:
    """The result of `prune`. `outcome` is None for a dry run; `notes` say what was ignored in the source and
    which limits of serving engines apply; `stale` are partial folders of other jobs, left untouched. `fetch` is
    what the whole job takes from the network, None for a checkpoint on this machine."""

    out: Path
    program: Program | GgufPruneProgram
    outcome: Outcome | None
    notes: tuple[str, ...]
    stale: tuple[Path, ...]
    fetch: Fetch | None = None


def prune(
    checkpoint: PathLike | Folder,
    out: PathLike,
    plan: Plan | PathLike | PlanMaker,
    *,
    top_k: int | None = None,
    store: str = "keep",
    max_shard_size: int | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    ignore_free_space: bool = False,
    ignore_unlisted: bool = False,
    card: bool = True,
    base_model: str | None = None,
    mtp: str | None = None,
    repair: Repair | None = None,
    manifest: bool | None = None,
    families: tuple[AnyFamily, ...] = FAMILIES,
    progress: OnProgress | None = None,
    on_fetch: OnFetch | None = None,
    ops: FileOps | None = None,
) -> PruneResult:
    """Write the experts of `checkpoint` that `plan` keeps as the new checkpoint folder `out`.

    `checkpoint` is a path, a model on the hub (`owner/name` or `owner/name@revision`), or a `Folder` of another
    source of bytes. `plan` is a `Plan`, the path of a
    plan file, or a function that makes a plan for the model; `top_k` replaces its number of experts a token,
    and may be more than the source's, up to the experts kept. `store`: "keep" copies expert weights
    unchanged; "bf16", "mxfp4", "f16" and "f32" convert them, each value
    rounded once to the nearest (see `moe_surgery.formats.convert`), and one too large for the format is
    refused. Other tensors keep their dtype. `max_shard_size` in bytes of tensors (default: 5 GB). `mtp`: "keep"
    (default) cuts layers for multi-token prediction to as many experts as the others, those with the largest router
    rows where the plan lists none; "drop" leaves these layers out. `repair` holds new values of small tensors, as
    `moe_surgery.repair` finds them.
    `card` writes a model card as README.md (a README.md of the source always becomes
    README.source.md); `base_model` is the source's id on the hub, where its path and files do not name it.
    `dry_run` stops before anything is written. `progress` is called with each `Progress`, in bytes of
    shards (written, or checked again after an interrupted run), `on_fetch` with what a model on the hub is about
    to cost in bytes over the network. `families` are the model families to
    recognise. `ops` is the table of system calls.

    A GGUF file (a path, or `owner/name[@revision]:FILE_OR_TAG` on the hub) becomes a GGUF file: `out` ends in
    .gguf and is one file unless `max_shard_size` is given; weights keep their types. `manifest` writes the digests
    that `verify` compares next to it (default: no); a checkpoint folder always has them.

    `out` appears whole or not at all, and the source is only ever read. Raises UsageError,
    InvalidInputError, PlanMismatchError, OutputError or DiskFullError, each with one line that says
    what to do. After an interruption (KeyboardInterrupt, a kill, or a NetworkError) the same call resumes.
    """
    if not isinstance(checkpoint, Folder) and is_gguf(checkpoint):
        from moe_surgery.pipeline.gguf import prune_gguf

        if store != "keep":
            raise UsageError(f"`store` {store}: weights of a GGUF file are copied as they are stored")
        if base_model is not None:
            raise UsageError("`base_model` is for the model card, which a GGUF file does not get")
        return prune_gguf(
            checkpoint,
            out,
            plan,
            top_k=top_k,
            max_shard_size=max_shard_size,
            dry_run=dry_run,
            overwrite=overwrite,
            manifest=bool(manifest),
            ignore_free_space=ignore_free_space,
            mtp=mtp,
            progress=progress,
            on_fetch=on_fetch,
            ops=ops,
        )
    if manifest is False:
        raise UsageError("`manifest` False: a checkpoint folder always has its manifest, surgery.json")
    shard_size = DEFAULT_SHARD_SIZE if max_shard_size is None else max_shard_size
    with Checkpoint.open(checkpoint, ignore_unlisted=ignore_unlisted, ops=ops) as opened:
        model = identify_model(opened, families)
        chosen = (plan(model) if callable(plan) else as_plan(plan)).with_top_k(top_k)
        program = prune_program(
            opened,
            model,
            chosen,
            store=store,
            max_shard_size=shard_size,
            card=card,
            base_model=base_model,
            mtp=mtp,
            repair=repair,
        )
        target = check_output(opened, out, overwrite=overwrite)
        log.info("reading %.2f GB from %d shards", program.bytes_read / 1e9, len(program.sources))
        fetch = to_fetch(program.shards, program.copies.values(), opened)
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
                on_fetch=on_fetch,
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
    return PruneResult(target, program, outcome, tuple(notes), tuple(stale_partials(target)), fetch)


def prune_program(
    opened: Checkpoint,
    model: ModelSpec,
    plan: Plan,
    *,
    store: str = "keep",
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    card: bool = True,
    base_model: str | None = None,
    mtp: str | None = None,
    repair: Repair | None = None,
    separate_dense: bool = False,
) -> Program:
    """The program of `prune`, with its card; see there, and `compile_program` for `separate_dense`."""
    program = compile_program(
        opened,
        model,
        plan,
        store=store,
        max_shard_size=max_shard_size,
        mtp=mtp,
        separate_dense=separate_dense,
    )
    copied = program.copies.get(SOURCE_README_NAME)
    readme = read_readme(None if copied is None else opened.files.open(copied))
    origin = origin_of(opened, model, base_model=base_model, card_base_model=readme.base_model)
    program = replace(program, origin=origin)
    if repair is not None:
        program = with_repair(program, model, repair)
    if card:
        from moe_surgery.card.card import with_card

        program = with_card(program, model, readme)
    return program
