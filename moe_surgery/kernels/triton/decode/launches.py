"""How many kernel launches a decode step takes, computed from the model's shape."""

from __future__ import annotations

from dataclasses import dataclass

from moe_surgery.kernels.triton.routing_metadata import ONE_LAUNCH
from moe_surgery.kernels.triton.tuning import use_gemv

__all__ = ["Launches", "launch_count"]


@dataclass(frozen=True, slots=True)
class Launches:
    """Kernel launches of one captured decode step: `moe` of the `layer` ones route and compute the experts."""

    layer: int
    moe: int
    outside: int
    layers: int

    @property
    def step(self) -> int:
        return self.layers * self.layer + self.outside


def launch_count(layers: int, experts: int, top_k: int, batch: int) -> Launches:
    """Launches of `DecodeStep` for `batch` sequences and `layers` layers of `experts` experts.

    At one token RMSNorm is part of the projection that follows it. Few (token, expert) pairs take two
    launches for the experts, more take four: routing metadata, gate_up, down, sum (five beyond ONE_LAUNCH pairs).
    """
    top_k = min(top_k, experts)
    scheduling = 1 if batch * top_k <= ONE_LAUNCH else 2
    moe = 1 + (2 if use_gemv(batch, top_k, experts) else 3 + scheduling)
    norms = 1 if batch == 1 else 2
    return Launches(layer=norms + 3 + moe, moe=moe, outside=norms, layers=layers)
