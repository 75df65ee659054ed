"""Both steps of a repair, from texts to repaired tensors, resumed where they stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from moe_surgery.progress import OnProgress, Progress
from moe_surgery.quality.repair.distill import NEGLIGIBLE, Distillation, distill, helps, mean_kl, step_sizes
from moe_surgery.quality.repair.mean_error import shift_biases
from moe_surgery.quality.repair.samples import Sample
from moe_surgery.quality.repair.state import RepairState, load_state, save_state
from moe_surgery.quality.repair.student import Student
from moe_surgery.quality.repair.targets import Targets, compute_targets
from moe_surgery.runtime.model import CausalLM

__all__ = ["Gain", "RepairedTensors", "repair_tensors"]

SHIFT_TOKENS = 8192
"""Training tokens of the first step, at most."""


@dataclass(frozen=True, slots=True)
class Gain:
    """KL divergence from the full model on `tokens` predicted tokens, nats per token, before and after."""

    tokens: int
    before: float
    after: float

    @property
    def percent(self) -> str:
        """The change in percent, signed."""
        return f"{100 * (self.after / self.before - 1):+.0f} %" if self.before > 0 else ""


@dataclass(frozen=True, slots=True)
class RepairedTensors:
    """`tensors` in the checkpoint's dtypes, empty where the repair does not help. `held_out` and `measured` are the
    figures by domain, those of the tensors that were tried; `steps` of the second step were done, of which `kl` lists
    the divergence on held-out texts: before the repair, after the first step, and from then on. `chosen` is the plan
    that these figures are of."""

    tensors: Mapping[str, Tensor]
    held_out: Mapping[str, Gain]
    measured: Mapping[str, Gain]
    steps: int
    kl: Sequence[float]
    chosen: int


def repair_tensors(
    full: CausalLM,
    students: Sequence[Student],
    train: Sequence[Sample],
    held: Sequence[Sample],
    measured: Sequence[Sample],
    settings: Distillation,
    files: tuple[Path, Path],
    job: str,
    progress: OnProgress | None,
) -> RepairedTensors:
    """Repair a student's tensors on `train`, choosing by `held`; `measured` is only measured. Of several `students`
    that one is repaired whose divergence on `held` is least after the first step.

    `files` keep the full model's distributions and the state; the same `job` resumes from them.
    """
    report = progress or (lambda _: None)
    targets_file, state_file = files
    everything = _with_rows([*train, *held, *measured])
    train, held, measured = (
        everything[: len(train)],
        everything[len(train) : len(train) + len(held)],
        everything[len(train) + len(held) :],
    )
    total = sum(len(s.tokens) for s in everything)
    tokens_done = 0

    def advance(tokens: int) -> None:
        nonlocal tokens_done
        tokens_done += tokens
        report(Progress("targets", tokens_done, total, "tokens"))

    advance(0)
    targets = compute_targets(full, everything, targets_file, job, progress=advance)
    state = load_state(state_file, job)
    fresh = [(s.tensors.clones(), step_sizes(s.tensors, settings.learning_rate)) for s in students]
    if state is None:
        tried = []
        for number, student in enumerate(students):
            report(Progress("first step", number, len(students), "plans"))
            tried.append(_first_step(full, student, train, held, targets, settings))
        report(Progress("first step", len(students), len(students), "plans"))
        chosen = min(range(len(tried)), key=lambda n: tried[n].best_kl)
        state = replace(tried[chosen], chosen=chosen)
        save_state(state, state_file, job)
    student, (originals, sizes) = students[state.chosen], fresh[state.chosen]

    def after_step(state: RepairState) -> None:
        report(Progress("repair", state.step, settings.steps, "steps", _note(state)))
        if state.step % settings.measured_every == 0:
            save_state(state, state_file, job)  # with the values and moments of this step

    if settings.steps:
        report(Progress("repair", state.step, settings.steps, "steps", _note(state)))
        distill(student, train, held, targets, settings, sizes, state, after_step=after_step)
        save_state(state, state_file, job)
    before, best = state.tensors["kl"]["before"], state.tensors["kl"]["best"]
    student.tensors.copy_from(originals)
    elsewhere = _sums(student, measured, targets, settings)
    student.tensors.copy_from(state.tensors["best"])
    elsewhere_after = _sums(student, measured, targets, settings)
    return RepairedTensors(
        student.tensors.stored() if helps(before, best, sum(s.count for s in held)) else {},
        _gains(held, before, best),
        _gains(measured, elsewhere, elsewhere_after),
        state.step,
        tuple(state.kl),
        state.chosen,
    )


def _with_rows(samples: Sequence[Sample]) -> list[Sample]:
    """`samples` with their first row of the stored distributions, which follow in this order."""
    rows, row = [], 0
    for sample in samples:
        rows.append(replace(sample, row=row))
        row += sample.count
    return rows


def _first_step(
    full: CausalLM,
    student: Student,
    train: Sequence[Sample],
    held: Sequence[Sample],
    targets: Targets,
    settings: Distillation,
) -> RepairState:
    """The state before the second step: with the biases shifted if that helps on `held`."""
    before = student.divergences(held, targets, settings.batch_tokens)
    originals = student.tensors.clones()
    if mean_kl(before, held) <= NEGLIGIBLE:  # nothing to repair
        kept = {"value": originals, "best": originals, "kl": {"before": before, "best": before}}
        return RepairState(kl=[mean_kl(before, held)], best_kl=mean_kl(before, held), done=True, tensors=kept)
    some: list[Sample] = []
    for sample in train:
        if sum(len(s.tokens) for s in some) >= SHIFT_TOKENS:
            break
        some.append(sample)
    shift_biases(full, student, some)
    shifted = student.divergences(held, targets, settings.batch_tokens)
    kl = [mean_kl(before, held), mean_kl(shifted, held)]
    best = before
    if kl[1] < kl[0]:
        originals, best = student.tensors.clones(), shifted
    return RepairState(
        kl=kl,
        best_kl=min(kl),
        tensors={"value": originals, "best": originals, "kl": {"before": before, "best": best}},
    )


def _note(state: RepairState) -> str:
    return f"KL {state.kl[0]:.4g} before, {state.best_kl:.4g} now"


def _sums(
    student: Student, samples: Sequence[Sample], targets: Targets, settings: Distillation
) -> Tensor | None:
    return student.divergences(samples, targets, settings.batch_tokens) if samples else None


def _gains(samples: Sequence[Sample], before: Tensor | None, after: Tensor | None) -> dict[str, Gain]:
    """By domain."""
    gains = {}
    for domain in dict.fromkeys(s.domain for s in samples):
        assert before is not None
        assert after is not None
        mine = [i for i, s in enumerate(samples) if s.domain == domain]
        tokens = sum(samples[i].count for i in mine)
        kl = [max(0.0, float(sums[mine].sum()) / tokens) for sums in (before, after)]  # float32 rounds
        gains[domain] = Gain(tokens, *kl)
    return gains
