"""What a sweep takes on the disk, before it begins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.pipeline.sweep.make import Layout, program_of
from moe_surgery.pipeline.sweep.variants import Variant
from moe_surgery.surgery.program import Program

__all__ = ["Cost", "Costs", "costs_of"]


@dataclass(frozen=True, slots=True)
class Cost:
    """A variant with a number of experts: `nbytes` of its shards, of which `dense_nbytes` in dense ones, and
    `small_nbytes` of its other files but for the manifest."""

    nbytes: int
    dense_nbytes: int
    small_nbytes: int
    parameters: int
    top_k: int
    store: str

    @classmethod
    def of(cls, program: Program, opened: Checkpoint) -> Cost:
        small = sum(map(len, program.texts.values()))
        return cls(
            program.nbytes,
            sum(s.nbytes for s in program.shards if s.dense),
            small + sum(opened.files.nbytes(name) for name in program.copies.values()),
            program.parameters,
            program.top_k,
            program.expert_format.name,
        )


@dataclass(frozen=True, slots=True)
class Costs:
    """`by_count` has a `Cost` for each number of experts; variants of other rankings differ by less than a block a
    shard. `needed` are the bytes that are still to be written, `shared` those that need not be, `free` those of the
    file system."""

    by_count: dict[int, Cost]
    variants: int
    nbytes: int
    shared: int
    finished: int
    needed: int
    free: int


def costs_of(
    opened: Checkpoint,
    variants: Sequence[Variant],
    layout: Layout,
    finished: Iterable[str],
    *,
    share: bool,
    donor: bool,
    free: int,
) -> Costs:
    """The costs of `variants`, of which those named in `finished` are there.

    `share`: dense shards are written once, with `donor` not even that.
    """
    by_count: dict[int, Cost] = {}
    for variant in variants:
        if variant.experts not in by_count:
            by_count[variant.experts] = Cost.of(program_of(opened, variant.plan, layout), opened)
    there = set(finished)
    costs = [by_count[v.experts] for v in variants]
    todo = [by_count[v.experts] for v in variants if v.name not in there]
    needed = sum(c.nbytes + c.small_nbytes for c in todo)
    shared = 0
    if share:
        dense = max(c.dense_nbytes for c in costs)
        shared = dense * (len(costs) - 1)
        needed -= dense * (len(todo) - (0 if donor or not todo else 1))
    return Costs(by_count, len(variants), sum(c.nbytes for c in costs), shared, len(there), needed, free)
