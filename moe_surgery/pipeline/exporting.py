"""`export_gguf`: a checkpoint as one GGUF file."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.source import Folder
from moe_surgery.engine.fetch import Fetch, OnFetch, to_fetch
from moe_surgery.export.compiler import compile_gguf, default_name
from moe_surgery.export.program import GgufProgram
from moe_surgery.export.run import write_gguf
from moe_surgery.export.tokenizer import find_tokenizer
from moe_surgery.families import FAMILIES, AnyFamily, identify_model
from moe_surgery.formats.encode_report import EncodeReport
from moe_surgery.progress import Counter, OnProgress
from moe_surgery.selection.arguments import PathLike
from moe_surgery.selection.plan import Plan, as_plan, check_top_k, plan_keeping
from moe_surgery.surgery.preflight import check_output_file

__all__ = ["ExportResult", "export_gguf"]

log = logging.getLogger("moe_surgery")


@dataclass(frozen=True, slots=True)
class ExportResult:
    """The result of `export_gguf`. `conversion` is the loss of conversion to MXFP4; None for a dry run. `notes`
    say what was ignored in the source; `fetch` is what the whole job takes from the network, None for a checkpoint
    on this machine."""

    out: Path
    program: GgufProgram
    conversion: EncodeReport | None
    notes: tuple[str, ...] = ()
    fetch: Fetch | None = None


def export_gguf(
    checkpoint: PathLike | Folder,
    out: PathLike,
    *,
    plan: Plan | PathLike | None = None,
    top_k: int | None = None,
    store: str = "keep",
    dense: str = "keep",
    name: str | None = None,
    tokenizer: bool = True,
    dry_run: bool = False,
    overwrite: bool = False,
    ignore_free_space: bool = False,
    ignore_unlisted: bool = False,
    families: tuple[AnyFamily, ...] = FAMILIES,
    progress: OnProgress | None = None,
    on_fetch: OnFetch | None = None,
    ops: FileOps | None = None,
) -> ExportResult:
    """Write `checkpoint`, with `plan` applied to it if given, as the GGUF file `out` for llama.cpp.

    `plan` is a `Plan` or the path of a plan file. `top_k` replaces the plan's or the model's number of
    experts a token, up to the experts that are kept. Weights keep their format and bits, norms and biases
    become F32; `store` "mxfp4" converts experts, `dense` "q8_0" converts attention, embedding and unembedding
    matrices. `name` is the model's name in the file (default: from the path).
    `tokenizer` False leaves tokenizer and chat template out. `families` are the model families to
    recognise. `progress` is called with each `Progress`, in bytes of the file; `on_fetch` as in `prune`.

    `out` appears whole or not at all, and the source is only ever read. Raises UsageError,
    InvalidInputError, PlanMismatchError, OutputError or DiskFullError, each with one line that says
    what to do.
    """
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
            name=name or default_name(opened.files),
            store=store,
            dense=dense,
        )
        log.info("reading %.2f GB, a tokenizer of %d tokens", program.bytes_read / 1e9, program.tokens)
        fetch = to_fetch([program], [], opened)
        conversion = None
        if not dry_run:
            conversion = write_gguf(
                program,
                opened,
                target,
                overwrite=overwrite,
                ignore_free_space=ignore_free_space,
                progress=Counter(progress, "export", program.nbytes, "bytes").advance,
                on_fetch=on_fetch,
                ops=ops,
            )
    return ExportResult(target, program, conversion, model.notes, fetch)
