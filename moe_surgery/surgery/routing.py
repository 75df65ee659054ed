"""Whether the router of a model can work with the experts that a plan keeps."""

from __future__ import annotations

from moe_surgery.errors import PlanMismatchError
from moe_surgery.families.model_spec import ModelSpec
from moe_surgery.selection.plan import Plan

__all__ = ["check_routing", "nearest_count", "problem_of_count"]


def problem_of_count(model: ModelSpec, kept: int, top_k: int) -> str | None:
    """Why a layer of `model` cannot keep `kept` experts, None where it can."""
    if kept < model.minimum:
        least = "2" if model.minimum == 2 else str(model.minimum)
        return f"{model.family.title} needs at least {least} experts in a layer"
    return None if model.grouping is None else model.grouping.problem_of_count(kept, top_k)


def nearest_count(model: ModelSpec, kept: int, top_k: int | None = None) -> int:
    """The number of experts nearest to `kept` that a layer can keep with `top_k` (default: the model's).

    The smaller of two as near; `kept` itself where it is one.
    """
    wanted = model.top_k if top_k is None else top_k
    counts = (n for n in range(1, model.experts + 1) if problem_of_count(model, n, min(wanted, n)) is None)
    return min(counts, key=lambda n: (abs(n - kept), n), default=kept)


def check_routing(model: ModelSpec, plan: Plan, top_k: int) -> None:
    """Raise PlanMismatchError unless the pruned router chooses as the full one does among the kept experts."""
    kept = len(plan.layers[0])
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
