"""The producer of an output shard."""

from __future__ import annotations

from collections.abc import Mapping

from moe_surgery.checkpoint.shard import OpenFile
from moe_surgery.engine.producer import Producer
from moe_surgery.engine.spans import Copy, Literal
from moe_surgery.surgery.program import AddLowRank, OutputShard, Remap
from moe_surgery.surgery.routing_table import RoutingTables

__all__ = ["producer_of"]


def producer_of(shard: OutputShard, sources: Mapping[str, OpenFile]) -> Producer:
    """The producer of `shard`. Copies do not need numpy, which is a third of the memory of such a job."""
    kinds = {type(part) for tensor in shard.tensors for part in tensor.parts} - {Literal}
    if kinds <= {Copy}:
        return Producer(shard, sources)
    if kinds <= {Copy, Remap}:
        return Producer(shard, sources, RoutingTables(sources))
    if AddLowRank in kinds:
        from moe_surgery.surgery.merge.merged_weights import MergedWeights

        return Producer(shard, sources, MergedWeights(sources))
    from moe_surgery.surgery.conversions import Conversions

    return Producer(shard, sources, Conversions(sources))
