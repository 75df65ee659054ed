"""Jobs on GGUF files: inspect, plan, prune. `prune`, `make_plan` and `inspect` hand them over."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.gguf.model_file import GgufModel
from moe_surgery.checkpoint.gguf.resolve import open_gguf
from moe_surgery.checkpoint.staging import stale_partials
from moe_surgery.engine.fetch import OnFetch, to_fetch
from moe_surgery.errors import CheckpointWarning
from moe_surgery.families.gguf import identify_gguf
from moe_surgery.families.model_spec import ModelSpec
from moe_surgery.pipeline.planning import PlanMaker
from moe_surgery.pipeline.pruning import PruneResult
from moe_surgery.progress import Counter, OnProgress
from moe_surgery.selection.arguments import PathLike
from moe_surgery.selection.plan import Plan, as_plan
from moe_surgery.surgery.gguf.compiler import compile_gguf_prune
from moe_surgery.surgery.gguf.run import run_gguf_program
from moe_surgery.surgery.mtp import mtp_notes
from moe_surgery.surgery.preflight import check_gguf_outputs, checked_gguf_path
from moe_surgery.surgery.serving import llama_cpp_notes

__all__ = ["opened_gguf", "prune_gguf"]

log = logging.getLogger("moe_surgery")


@contextmanager
def opened_gguf(name: PathLike, ops: FileOps | None = None) -> Iterator[tuple[GgufModel, ModelSpec]]:
    """The GGUF model `name`, identified, within the block. Each of its notes is also a CheckpointWarning."""
    with open_gguf(name, ops) as model:
        spec = identify_gguf(model)
        for note in spec.notes:
            warnings.warn(note, CheckpointWarning, stacklevel=4)
        yield model, spec


def prune_gguf(
    source: PathLike,
    out: PathLike,
    plan: Plan | PathLike | PlanMaker,
    *,
    top_k: int | None = None,
    max_shard_size: int | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    manifest: bool = False,
    ignore_free_space: bool = False,
    mtp: str | None = None,
    progress: OnProgress | None = None,
    on_fetch: OnFetch | None = None,
    ops: FileOps | None = None,
) -> PruneResult:
    """Write the experts of the GGUF model `source` that `plan` keeps as the new GGUF file `out`; see `prune`.

    `max_shard_size`: in bytes of tensors; where one file does not suffice `out` becomes a set, as llama.cpp names them.
    """
    with opened_gguf(source, ops) as (model, spec):
        chosen = (plan(spec) if callable(plan) else as_plan(plan)).with_top_k(top_k)
        target = checked_gguf_path(out)
        program = compile_gguf_prune(
            model, spec, chosen, name=target.name, max_shard_size=max_shard_size, mtp=mtp
        )
        files = [target.with_name(file.name) for file in program.files]
        check_gguf_outputs(model, files, overwrite=overwrite)
        log.info("reading %.2f GB from %d files", program.bytes_read / 1e9, len(program.sources))
        fetch = to_fetch(program.files, [], model)
        outcome = None
        if not dry_run:
            outcome = run_gguf_program(
                program,
                model,
                target,
                overwrite=overwrite,
                manifest=manifest,
                ignore_free_space=ignore_free_space,
                progress=Counter(progress, "prune", program.nbytes, "bytes").advance,
                on_fetch=on_fetch,
                ops=ops,
            )
    notes = [
        *spec.notes,
        *mtp_notes(spec, program.plan),
        *llama_cpp_notes(
            chosen.uniform_experts or 0,
            program.top_k,
            spec.top_k,
            chosen.top_k,
            grouped=spec.grouping is not None,
        ),
    ]
    return PruneResult(
        files[0],
        program,
        outcome,
        tuple(notes),
        tuple(stale_partials(target)),
        fetch,
    )
