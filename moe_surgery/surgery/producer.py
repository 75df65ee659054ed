"""The producer of an output shard."""

from __future__ import annotations

from collections.abc import Mapping

from moe_surgery.checkpoint.shard import OpenFile
from moe_surgery.engine.producer import Producer
from moe_surgery.engine.spans import Copy, Literal
from moe_surgery.surgery.program import AddLowRank, OutputShard, Remap
from moe_surgery.surgery.routing_table import RoutingTables

__all__ = ["converts", "producer_of"]


def converts(shard: OutputShard) -> bool:
    """Whether weights of `shard` are converted, which is reported."""
    return not _kinds(shard) <= {Copy, Remap}


def _kinds(shard: OutputShard) -> set[type]:
    return {type(part) for tensor in shard.tensors for part in tensor.parts} - {Literal}


def producer_of(shard: OutputShard, sources: Mapping[str, OpenFile]) -> Producer:
    """The producer of `shard`. Copies do not need numpy, which is a third of the memory of such a job."""
    kinds = _kinds(shard)
    if kinds <= {Copy}:
        return Producer(shard, sources)
    if kinds <= {Copy, Remap}:
        return Producer(shard, sources, RoutingTables(sources))
    if AddLowRank in kinds:
        from moe_surgery.surgery.merge.merged_weights import MergedWeights

        return Producer(shard, sources, MergedWeights(sources))
    from moe_surgery.surgery.conversions import Conversions

    return Producer(shard, sources, Conversions(sources))
