"""The second step: Adam on the small tensors, by the divergence from the full model's next-token distributions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from moe_surgery.errors import InvalidInputError, UsageError
from moe_surgery.quality.repair.parameters import SmallTensors
from moe_surgery.quality.repair.samples import Sample, shuffled_batches
from moe_surgery.quality.repair.state import RepairState
from moe_surgery.quality.repair.student import Student
from moe_surgery.quality.repair.targets import Targets

__all__ = ["NEGLIGIBLE", "Distillation", "distill", "helps", "mean_kl", "step_sizes"]

BETAS, EPSILON = (0.9, 0.99), 1e-10
WARM_UP = 5
MEASUREMENTS = 20
LEAST_GAIN = 0.01
NEGLIGIBLE = 5e-3
"""Nats per token: half a percent of perplexity. Held-out texts cannot tell a smaller gain from none."""


@dataclass(frozen=True, slots=True)
class Distillation:
    """`steps` of Adam, each on passages of about `batch_tokens` tokens; `learning_rate` is relative to the size of a
    tensor's values (see `step_sizes`). It stops early after `patience` measurements on held-out texts without a
    better one. `seed` draws the order of the passages.
    """

    steps: int = 100
    batch_tokens: int = 1024
    learning_rate: float = 0.01
    patience: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens", "patience"):
            if getattr(self, name) < (0 if name == "steps" else 1):
                raise UsageError(f"`{name}` {getattr(self, name)}: must be at least {int(name != 'steps')}")
        if not 0 < self.learning_rate < 1:
            raise UsageError(f"`learning_rate` {self.learning_rate}: must be above 0 and below 1")

    @property
    def measured_every(self) -> int:
        """Steps between two measurements."""
        return max(1, self.steps // MEASUREMENTS)


def step_sizes(tensors: SmallTensors, learning_rate: float) -> dict[str, float]:
    """The learning rate of each tensor."""
    sizes = {}
    for name, value in tensors.values.items():
        rms = float(value.square().mean().sqrt())
        sizes[name] = learning_rate * max(rms, 1e-3)
    return sizes


def distill(
    student: Student,
    train: Sequence[Sample],
    held: Sequence[Sample],
    targets: Targets,
    settings: Distillation,
    sizes: Mapping[str, float],
    state: RepairState,
    *,
    after_step: Callable[[RepairState], None],
) -> None:
    """Train the student's small tensors from `state.step` on, and leave the best ones on `held` in
    `state.tensors["best"]`, with the divergence of each sample as `state.tensors["kl"]["best"]`.

    `sizes` are `step_sizes` of the tensors before the first step; `state` must hold the measurement before.
    `after_step` is called after each step, with values and moments in the state where it ends with a measurement. The
    same state gives the same result. Raises InvalidInputError where the divergence is not finite.
    """
    tensors = student.tensors
    if "value" in state.tensors:
        tensors.copy_from(state.tensors["value"])
    leaves = tensors.require_grad()
    adam = _Adam(tensors.values, state)
    batches = shuffled_batches(train, settings.batch_tokens, settings.seed)
    for batch in islice(batches, state.step, None):
        if state.step >= settings.steps or state.done:
            break
        kl = student.divergence_and_gradient(batch, targets)
        if not math.isfinite(kl):
            raise InvalidInputError(
                f"step {state.step + 1}: the divergence is not finite; lower `learning_rate`"
            )
        adam.step(sizes, schedule(state.step, settings.steps), state.step + 1)
        state.step += 1
        if state.step % settings.measured_every == 0 or state.step == settings.steps:
            _measure(student, held, targets, settings, state)
            state.tensors["value"] = tensors.clones()
            adam.keep(state)
        after_step(state)
    for leaf in leaves:
        leaf.requires_grad_(False)
    state.done = True


class _Adam:
    """Adam (arXiv 1412.6980) in a few lines: torch's imports its compiler, which takes seconds."""

    def __init__(self, values: Mapping[str, Tensor], state: RepairState) -> None:
        """Moments from `state`, where it has any."""
        self._values = values
        self._means, self._squares = (
            {name: state.tensors[group][name].to(v.device, copy=True) for name, v in values.items()}
            if group in state.tensors
            else {name: torch.zeros_like(v, requires_grad=False) for name, v in values.items()}
            for group in ("mean", "square")
        )

    @torch.no_grad()
    def step(self, sizes: Mapping[str, float], factor: float, number: int) -> None:
        """Step `number` (from 1) by the values' gradients, which are cleared; `sizes` times `factor` are the rates."""
        first, second = BETAS
        for name, value in self._values.items():
            if value.grad is None:  # an expert bias that no token reached
                continue
            mean = self._means[name].lerp_(value.grad, 1 - first)
            square = self._squares[name].mul_(second).addcmul_(value.grad, value.grad, value=1 - second)
            root = (square / (1 - second**number)).sqrt_().add_(EPSILON)
            value.addcdiv_(mean, root, value=-sizes[name] * factor / (1 - first**number))
            value.grad = None

    def keep(self, state: RepairState) -> None:
        """Copy the moments into `state`."""
        for group, tensors in (("mean", self._means), ("square", self._squares)):
            state.tensors[group] = {name: t.to("cpu", copy=True) for name, t in tensors.items()}


def schedule(step: int, steps: int) -> float:
    """The learning rate's factor at `step` of `steps`, from 0: a short rise, then half a cosine to zero."""
    rise = min(1.0, (step + 1) / WARM_UP)
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def _measure(
    student: Student, held: Sequence[Sample], targets: Targets, settings: Distillation, state: RepairState
) -> None:
    sums = student.divergences(held, targets, settings.batch_tokens)
    kl = mean_kl(sums, held)
    state.kl.append(kl)
    if kl < state.best_kl:
        state.best_kl, state.waited = kl, 0
        state.tensors["best"] = student.tensors.clones()
        state.tensors["kl"]["best"] = sums
    else:
        state.waited += 1
        state.done = state.waited >= settings.patience


def mean_kl(sums: Tensor, samples: Sequence[Sample]) -> float:
    """Nats per predicted token, from the sum of each sample."""
    return float(sums.sum()) / sum(s.count for s in samples)


def helps(before: Tensor, after: Tensor, tokens: int) -> bool:
    """Whether divergences over `tokens` tokens fell from `before` to `after` ([samples], sums): by at least a
    hundredth, by more than the standard error of the sum of their differences, and by more than is `NEGLIGIBLE`."""
    gains = before - after
    error = float(gains.std()) * math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    least = max(error, LEAST_GAIN * float(before.sum()), NEGLIGIBLE * tokens)
    return float(gains.sum()) > least
