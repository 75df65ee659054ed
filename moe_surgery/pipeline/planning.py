"""Inspecting a checkpoint and planning for it: jobs that write no tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.gguf.resolve import is_gguf
from moe_surgery.checkpoint.source import Folder
from moe_surgery.errors import PlanMismatchError
from moe_surgery.families import FAMILIES, AnyFamily, identify_model
from moe_surgery.families.identity import identity
from moe_surgery.families.model_spec import ModelSpec
from moe_surgery.selection.arguments import PathLike

if TYPE_CHECKING:
    from moe_surgery.selection.plan import Plan
    from moe_surgery.selection.statistics import Statistics
    from moe_surgery.surgery.inspect import Inspection

__all__ = ["PlanMaker", "check_statistics", "inspect", "make_plan"]

PlanMaker = Callable[[ModelSpec], "Plan"]


def inspect(
    checkpoint: PathLike | Folder,
    *,
    ignore_unlisted: bool = False,
    families: tuple[AnyFamily, ...] = FAMILIES,
) -> Inspection:
    """Family, sizes and bytes of `checkpoint`, and its sizes with n = 1..E experts kept.

    `checkpoint` may be a GGUF file; then the result is a `GgufInspection`.
    Reads headers only. `families` are the model families to recognise.
    Raises InvalidInputError or OutputError.
    """
    from moe_surgery.surgery.inspect import inspect_checkpoint

    if not isinstance(checkpoint, Folder) and is_gguf(checkpoint):
        from moe_surgery.pipeline.gguf import opened_gguf
        from moe_surgery.surgery.gguf.inspect import inspect_gguf

        with opened_gguf(checkpoint) as (gguf, spec):
            return inspect_gguf(gguf, spec)
    with Checkpoint.open(checkpoint, ignore_unlisted=ignore_unlisted) as opened:
        return inspect_checkpoint(opened, identify_model(opened, families))


def make_plan(checkpoint: PathLike, choose: PlanMaker, *, families: tuple[AnyFamily, ...] = FAMILIES) -> Plan:
    """The plan that `choose` makes for the model in `checkpoint`, checked against it.

    Raises PlanMismatchError where it does not fit, and any error of opening the checkpoint.
    """
    from moe_surgery.surgery.routing import check_routing

    if is_gguf(checkpoint):
        from moe_surgery.pipeline.gguf import opened_gguf

        with opened_gguf(checkpoint) as (_, model):
            pass
    else:
        with Checkpoint.open(checkpoint) as opened:
            model = identify_model(opened, families)
    plan = choose(model)
    plan.check_fits(
        model.model_type,
        model.experts,
        model.layers,
        str(checkpoint),
        model.layer_numbers,
        also=model.model_types,
    )
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
    if statistics.identity is None:  # imported without a model; layers and experts are checked with the plan
        return
    if is_gguf(checkpoint):
        from moe_surgery.pipeline.gguf import opened_gguf

        with opened_gguf(checkpoint) as (gguf, spec):
            actual = identity(gguf, spec)
    else:
        with Checkpoint.open(checkpoint) as opened:
            actual = identity(opened, identify_model(opened, families))
    if statistics.identity != actual:
        raise PlanMismatchError(
            f"the statistics were made from another checkpoint ({statistics.identity}), not from "
            f"{checkpoint} ({actual}); run profile on this one"
        )
