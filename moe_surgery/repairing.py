"""`repair`: a plan applied, and small tensors of the result trained to follow the full model."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_surgery import families
from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.errors import PlanMismatchError, UsageError
from moe_surgery.families.identity import identity
from moe_surgery.families.model_spec import ModelSpec
from moe_surgery.pipeline.pruning import PruneResult, prune
from moe_surgery.progress import OnProgress
from moe_surgery.quality.candidates import source_experts
from moe_surgery.quality.corpus import Corpus, open_corpus
from moe_surgery.quality.repair.distill import NEGLIGIBLE, Distillation
from moe_surgery.quality.repair.job import Gain, RepairedTensors, repair_tensors
from moe_surgery.quality.repair.samples import as_samples, split_held_out
from moe_surgery.quality.repair.student import Student
from moe_surgery.quality.resume import check_writable, default_context, job_digest
from moe_surgery.quality.text_files import Texts, as_text_files
from moe_surgery.runtime.load import load_model
from moe_surgery.runtime.text import Text
from moe_surgery.selection.arguments import PathLike
from moe_surgery.selection.plan import Plan, as_plan
from moe_surgery.surgery.repaired import Repair
from moe_surgery.version import __version__

__all__ = ["RepairResult", "repair"]

DEFAULTS = Distillation()
log = logging.getLogger("moe_surgery")


@dataclass(frozen=True, slots=True)
class RepairResult:
    """The new checkpoint. `tensors` were repaired: none where that did not help, and the checkpoint is the one that
    `prune` writes. `held_out` and `measured` are KL divergences by domain before and after (what was tried, where
    nothing was repaired); `kl` lists those on held-out texts before, after the first step, and during the second, of
    which `steps` were done. `plan` is the one that was taken."""

    out: Path
    plan: Plan
    tensors: tuple[str, ...]
    held_out: dict[str, Gain]
    measured: dict[str, Gain]
    steps: int
    kl: tuple[float, ...]
    pruned: PruneResult

    @property
    def repaired(self) -> bool:
        return bool(self.tensors)


def repair(
    checkpoint: PathLike,
    texts: Texts,
    output: PathLike,
    *,
    plan: Plan | PathLike | Sequence[Plan | PathLike] | None = None,
    source: PathLike | None = None,
    measure: Texts = (),
    norms: bool = False,
    steps: int = DEFAULTS.steps,
    learning_rate: float = DEFAULTS.learning_rate,
    batch_tokens: int = DEFAULTS.batch_tokens,
    patience: int = DEFAULTS.patience,
    held_out: float = 0.2,
    context: int | None = None,
    max_tokens: int | None = None,
    format: str | None = None,
    answers_only: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    progress: OnProgress | None = None,
) -> RepairResult:
    """Prune `checkpoint` by `plan` and train small tensors of the result to follow the full model on `texts`.

    Of several plans that one is taken whose held-out divergence is least after the first step. Or, with `source`:
    `checkpoint` is pruned from that one, and its plan and storage format are taken. Weights of
    experts and of attention stay byte for byte; routers, biases of the experts' down projections and, with `norms`,
    norm weights change. First each layer's error on the texts goes into the biases, then `steps` of Adam on batches of
    `batch_tokens` tokens lower the KL divergence from the full model's next-token distributions; `learning_rate` is
    relative to a tensor's values. A share `held_out` of each domain's texts is not trained on: it decides which state
    is best, stops after `patience` of twenty measurements without a better one, and whether the repair helps at all. If
    not, the checkpoint is written as `prune` writes it, and a warning says so. `measure` are texts of other domains on
    which the divergence is measured before and after.

    `texts`, `format`, `context` and `max_tokens` as for `profile`; `answers_only`: only tokens of the conversations'
    answers count. `device`, `dtype` and `backend` are those of the full model; the pruned one is
    computed in float32 in plain PyTorch. `progress` is called with each `Progress`, its `note` with the divergences.

    What is finished is kept in `.NAME.targets` and `.NAME.repair` next to `output`; the same call resumes there, and
    gives the same bytes as one that was not interrupted. Raises UsageError, InvalidInputError (a family that is not
    run, texts that cannot be read), PlanMismatchError, OutputError.
    """
    plans = _listed(plan)
    if (not plans) == (source is None):
        raise UsageError("what to keep: pass a `plan`, or the `source` that the checkpoint was pruned from")
    if not 0 < held_out < 1:
        raise UsageError(f"`held_out` {held_out}: must be above 0 and below 1")
    settings = Distillation(steps, batch_tokens, learning_rate, patience, seed)
    full_path = checkpoint if source is None else source
    with Checkpoint.open(full_path) as opened:
        spec = families.identify_model(opened)
        spec.require_description()
        source_identity = identity(opened, spec)
    store = "keep"
    if source is not None:
        pruned_plan, store = _plan_of(checkpoint, spec, full_path)
        plans = [pruned_plan]
    out = Path(output)
    for each in plans:  # refuses what cannot be written
        prune(full_path, out, each, store=store, overwrite=overwrite, dry_run=True)
    files = (out.with_name(f".{out.name}.targets"), out.with_name(f".{out.name}.repair"))
    check_writable(*files)
    full = load_model(full_path, device, dtype, backend=backend)
    students = [Student(full, each, spec.described.weights, norms=norms) for each in plans]
    text = Text(full_path)
    context = default_context(spec, context)
    corpus = open_corpus(as_text_files(texts, format), text, context=context, max_tokens=max_tokens)
    train, held = split_held_out(as_samples(corpus, answers_only), held_out, seed)
    if not train:
        raise UsageError(
            "the texts have no token to predict"
            + (" in an answer of a conversation (`answers_only`)" if answers_only else "; give longer ones")
        )
    if corpus.split:
        log.warning("%d texts are longer than %d tokens and were split", corpus.split, corpus.context)
    others = _measured(measure, format, text, context, max_tokens)
    measured = as_samples(others, answers_only) if others is not None else []
    recorded = {
        **full.computation,
        **asdict(settings),
        "context": context,
        "max_tokens": max_tokens,
        "held_out": held_out,
        "answers_only": answers_only,
        "norms": norms,
    }
    read = [corpus.texts, others.texts if others else {}]
    formats = [f.format for c in (corpus, others) if c for f in c.files]
    job = job_digest(
        [
            source_identity,
            [each.as_dict() for each in plans],
            read,
            formats,
            recorded,
            torch.get_num_threads(),
            __version__,
        ]
    )
    result = repair_tensors(full, students, train, held, measured, settings, files, job, progress)
    del full, students
    record = {"texts": corpus.texts, **_figures(result), "settings": recorded}
    pruned = prune(
        full_path,
        out,
        plans[result.chosen],
        store=store,
        overwrite=overwrite,
        repair=Repair({n: _bytes(t) for n, t in result.tensors.items()}, record) if result.tensors else None,
        progress=progress,
    )
    for file in files:
        with suppress(OSError):
            file.unlink()
    if result.kl[0] <= NEGLIGIBLE:
        log.warning("nothing to repair: on held-out texts the plan predicts what the full model does")
    elif not result.tensors:
        log.warning(
            "the repair does not lower the divergence on held-out texts: %s holds the plan unrepaired; more texts or "
            "another `learning_rate` may help",
            out,
        )
    return RepairResult(
        pruned.out,
        plans[result.chosen],
        tuple(result.tensors),
        dict(result.held_out),
        dict(result.measured),
        result.steps,
        tuple(result.kl),
        pruned,
    )


def _listed(plan: Plan | PathLike | Sequence[Plan | PathLike] | None) -> list[Plan]:
    """One plan, several, or none."""
    if plan is None:
        return []
    if isinstance(plan, (Plan, str, os.PathLike)):
        return [as_plan(plan)]
    return [as_plan(each) for each in plan]


def _plan_of(pruned: PathLike, full: ModelSpec, source: PathLike) -> tuple[Plan, str]:
    """The plan by which `pruned` was made from the model `full`, and how its experts are stored.

    Raises PlanMismatchError where it was not made from that model, or does not say which experts it has.
    """
    with Checkpoint.open(pruned) as opened:
        spec = families.identify_model(opened)
        spec.require_description()
        kept, provenance = source_experts(opened.files, spec.layers, full.experts)
    fits = (spec.model_type, spec.layers) == (full.model_type, full.layers)
    if kept is None or not fits or any(len(row) != spec.experts for row in kept):
        raise PlanMismatchError(
            f"{pruned}: its manifest or expert mapping does not say which experts of {source} it has; pass the full "
            "checkpoint with a `plan`"
        )
    provenance = {key: value for key, value in provenance.items() if key != "repair"}
    top_k = None if spec.top_k == min(full.top_k, spec.experts) else spec.top_k
    plan = Plan(spec.model_type, full.experts, kept, top_k, provenance)
    return plan, "keep" if spec.expert_format == full.expert_format else spec.expert_format.name


def _measured(
    texts: Texts, format: str | None, text: Text, context: int, max_tokens: int | None
) -> Corpus | None:
    files = as_text_files(texts, format)
    return open_corpus(files, text, context=context, max_tokens=max_tokens) if files else None


def _figures(result: RepairedTensors) -> dict[str, object]:
    """For the manifest: figures with six digits, by domain."""

    def shown(gains: dict[str, Gain]) -> dict[str, object]:
        return {
            domain: {"tokens": g.tokens, "kl_before": _six(g.before), "kl_after": _six(g.after)}
            for domain, g in gains.items()
        }

    return {
        "held_out": shown(dict(result.held_out)),
        "measured": shown(dict(result.measured)),
        "steps": result.steps,
    }


def _six(value: float) -> float:
    return float(f"{value:.6g}")


def _bytes(tensor: Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()
