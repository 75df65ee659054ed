"""Layers for multi-token prediction (MTP): cut to the same number of experts, or left out.

config.json has one number of experts for all layers, so these layers must have it too. Nothing is measured on
them when texts are profiled; their experts are therefore chosen by the L2 norm of their router rows, which is
a guess: a large row makes large logits, so the expert is chosen often. Of a GGUF file whose routers are quantised
the first experts stay.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from moe_surgery.checkpoint.checkpoint import Checkpoint, TensorRef
from moe_surgery.errors import PlanMismatchError, UsageError
from moe_surgery.families.base import GgufFamily, Role
from moe_surgery.families.model_spec import ModelSpec, ModelTensor
from moe_surgery.selection.plan import Plan

if TYPE_CHECKING:
    from moe_surgery.checkpoint.gguf.model_file import GgufModel

__all__ = ["MTP_CHOICES", "choose_mtp", "mtp_notes"]

MTP_CHOICES: Final = ("keep", "drop")
_READABLE: Final = ("BF16", "F16", "F32")


def choose_mtp(
    checkpoint: Checkpoint | GgufModel,
    model: ModelSpec,
    plan: Plan,
    top_k: int,
    mtp: str | None = None,
) -> Plan:
    """`plan` with the experts of each MTP layer of `model`; itself where there are none.

    `mtp` "keep" (default): those that the plan lists, else as many as other layers keep, those with the largest
    L2 norm of the router row, in ascending order (with groups: of each group). "drop": no MTP layers.
    Raises UsageError for `mtp` without such layers, PlanMismatchError where the plan's do not fit.
    """
    if mtp is not None and mtp not in MTP_CHOICES:
        raise UsageError(f"`mtp` {mtp}: choose one of {', '.join(MTP_CHOICES)}")
    has_mtp = any(t.mtp for t in model.tensors)
    if not has_mtp:
        if mtp == "drop":
            raise UsageError(f"`mtp` drop: {checkpoint.path} has no layers for multi-token prediction")
        if plan.mtp_layers:
            raise PlanMismatchError(
                f"the plan lists layers for multi-token prediction, but {checkpoint.path} has none"
            )
        return plan
    if mtp == "drop":
        return replace(plan, mtp_layers=())
    if plan.mtp_layers == () and mtp is None:
        return plan
    if not model.mtp_layers:
        return replace(plan, mtp_layers=None)
    kept = len(plan.layers[0])
    if plan.mtp_layers:
        rows = plan.mtp_layers
        if len(rows) != len(model.mtp_layers) or any(len(row) != kept for row in rows):
            raise PlanMismatchError(
                f"the plan lists {len(rows)} layers for multi-token prediction; {checkpoint.path} has "
                f"{len(model.mtp_layers)}, and each must keep {kept} experts like the other layers"
            )
        return plan
    routers = _routers(model)
    if kept == model.experts:
        return replace(plan, mtp_layers=(tuple(range(kept)),) * len(routers))
    return replace(
        plan, mtp_layers=tuple(_largest(checkpoint, model, router, kept, top_k) for router in routers)
    )


def mtp_notes(model: ModelSpec, plan: Plan) -> list[str]:
    """How the experts of MTP layers were chosen, or what dropping them means."""
    if not any(t.mtp for t in model.tensors):
        return []
    if plan.mtp_layers is None:
        return []
    if not plan.mtp_layers:
        return [
            "layers for multi-token prediction are left out: speculative decoding with them is not possible"
        ]
    if len(plan.mtp_layers[0]) == model.experts:
        return []
    names = ", ".join(model.mtp_layers)
    which = "the first experts" if _by_number(model) else "the experts with the largest router rows"
    return [
        f"{names} (multi-token prediction) keeps {which}, as no statistics "
        "exist for it; the model's output does not depend on it, the speed of speculative decoding does "
        "(`mtp` drop leaves it out)"
    ]


def _routers(model: ModelSpec) -> list[TensorRef]:
    """The router weights of MTP layers, layer by layer."""

    def row(tensor: ModelTensor) -> int:
        return tensor.layer or 0

    found = (t for t in model.tensors if t.mtp and t.role is Role.ROUTER and len(t.shape) == 2 and not t.axis)
    return [t.stored for t in sorted(found, key=row)]


def _by_number(model: ModelSpec) -> bool:
    """Whether the rows of a router cannot be read, so that the first experts stay."""
    return isinstance(model.family, GgufFamily) and any(r.dtype not in _READABLE for r in _routers(model))


def _largest(
    checkpoint: Checkpoint | GgufModel, model: ModelSpec, router: TensorRef, kept: int, top_k: int
) -> tuple[int, ...]:
    order = list(range(model.experts))
    if not _by_number(model):
        norms = [sum(x * x for x in row) for row in _rows(checkpoint, router, model.experts)]
        order.sort(key=lambda e: (-norms[e], e))
    grouping = model.grouping
    if grouping is not None and grouping.problem_of_count(kept, top_k) is None:
        return tuple(sorted(grouping.best(order, kept)))
    return tuple(sorted(order[:kept]))


def _rows(checkpoint: Checkpoint | GgufModel, router: TensorRef, experts: int) -> Iterator[array[float]]:
    """The rows of a router's weight as floats, one at a time. Raises UsageError for other dtypes."""
    source = checkpoint.shards[router.shard].source
    if router.dtype not in _READABLE:
        raise UsageError(
            f"{checkpoint.where(router.name)}: cannot rank experts by rows of {router.dtype}; pass `mtp` drop, or "
            "a plan that lists the experts (mtp_layers)"
        )
    rows = router.rows(0, experts)
    values = source.read(rows.offset, rows.nbytes)  # at once: each read is a request to a model on the hub
    step = rows.nbytes // experts
    for start in range(0, rows.nbytes, step):
        raw = values[start : start + step]
        if router.dtype == "BF16":
            wide = bytearray(2 * len(raw))
            wide[2::4], wide[3::4] = raw[0::2], raw[1::2]
            yield array("f", bytes(wide))
        elif router.dtype == "F16":
            yield array("f", struct.unpack(f"<{len(raw) // 2}e", raw))
        else:
            yield array("f", raw)
