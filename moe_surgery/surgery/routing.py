"""Whether the router of a model can work with the experts that a plan keeps."""

from __future__ import annotations

import warnings

from moe_surgery.errors import CheckpointWarning, PlanMismatchError
from moe_surgery.families.base import Family, GgufFamily
from moe_surgery.families.model_spec import ModelSpec
from moe_surgery.selection.plan import Plan
from moe_surgery.surgery.serving import LLAMA_CPP_COUNTS, fast_counts

__all__ = [
    "check_routing",
    "check_view",
    "nearest_count",
    "offered_count",
    "problem_of_count",
    "rounded_count",
]


def problem_of_count(model: ModelSpec, kept: int, top_k: int) -> str | None:
    """Why a layer of `model` cannot keep `kept` experts, None where it can."""
    if kept < model.minimum:
        return f"{model.family.title} needs at least {model.minimum} experts in a layer"
    return None if model.grouping is None else model.grouping.problem_of_count(kept, top_k)


def nearest_count(model: ModelSpec, kept: int, top_k: int | None = None) -> int:
    """The number of experts nearest to `kept` that a layer can keep with `top_k` (default: the model's).

    The smaller of two as near; `kept` itself where it is one.
    """
    wanted = model.top_k if top_k is None else top_k
    counts = (n for n in range(1, model.experts + 1) if problem_of_count(model, n, wanted) is None)
    return min(counts, key=lambda n: (abs(n - kept), n), default=kept)


def rounded_count(model: ModelSpec, kept: int) -> int:
    """`kept`, or the nearest number that the router of `model` can choose from, with a CheckpointWarning."""
    if not 1 <= kept <= model.experts or (problem := problem_of_count(model, kept, model.top_k)) is None:
        return kept
    near = nearest_count(model, kept)
    warnings.warn(f"keeping {near} experts instead of {kept}: {problem}", CheckpointWarning, stacklevel=2)
    return near


def offered_count(model: ModelSpec, kept: int) -> int:
    """`rounded_count`, with a CheckpointWarning that names counts next to it which are served faster.

    Not for families with a full description.
    """
    count = rounded_count(model, kept)
    gguf = isinstance(model.family, GgufFamily)
    if gguf and model.grouping is not None:
        return count  # llama.cpp has no fused router with groups
    if not isinstance(model.family, Family) and 1 <= count <= model.experts:
        fast = fast_counts(model.model_type, count, model.experts, LLAMA_CPP_COUNTS if gguf else None)
        near = [n for n in fast if problem_of_count(model, n, model.top_k) is None]
        if near:
            warnings.warn(
                f"{'llama.cpp has' if gguf else 'serving engines have'} no fused router for {count} experts; the "
                "nearest with one: " + " and ".join(map(str, near)),
                CheckpointWarning,
                stacklevel=2,
            )
    return count


def check_routing(model: ModelSpec, plan: Plan, top_k: int) -> None:
    """Raise PlanMismatchError unless the pruned router chooses as the full one does among the kept experts.

    Also for a model of which no expert can be dropped. A plan that changes nothing always passes.
    """
    kept = len(plan.layers[0])
    unchanged = tuple(range(model.experts))
    if all(row == unchanged for row in (*plan.layers, *(plan.mtp_layers or ()))):
        return
    if model.refusal is not None:
        raise PlanMismatchError(model.refusal)
    if (problem := problem_of_count(model, kept, top_k)) is not None:
        near = nearest_count(model, kept, top_k)
        raise PlanMismatchError(f"{problem}; keep {near} experts, the nearest number that works")
    grouping = model.grouping
    if grouping is None:
        return
    names = [f"layer {n}" for n in plan.numbers]
    rows = [*plan.layers, *(plan.mtp_layers or ())]
    names += list(model.mtp_layers)
    for name, row in zip(names, rows, strict=False):
        if (problem := grouping.problem_of_row(row)) is not None:
            raise PlanMismatchError(f"{name}: {problem}")


def check_view(model: ModelSpec, plan: Plan, checkpoint: str) -> None:
    """Raise PlanMismatchError unless `plan` can restrict `model`, called `checkpoint`, without pruning it.

    Layers may keep different numbers of experts.
    """
    plan.check_fits(model.model_type, model.experts, model.layers, checkpoint, model.layer_numbers)
    for number, row in zip(plan.numbers, plan.layers, strict=True):
        top_k = min(plan.top_k or model.top_k, len(row))
        problem = problem_of_count(model, len(row), top_k)
        if problem is None and model.grouping is not None:
            problem = model.grouping.problem_of_row(row)
        if problem is not None:
            raise PlanMismatchError(f"layer {number}: {problem}")
