"""Experts on a device, copied from a pool in host memory: the host holds more of them, the disk all."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch

from moe_surgery.kernels.weights import DenseWeight, Weight
from moe_surgery.runtime.residency.pool import ExpertPool, Key, Weights

__all__ = ["DeviceSlots"]


class DeviceSlots:
    """Up to `capacity` experts on `device`, those used last, copied from `pool` when a layer asks for them.

    Tested with tensors on the CPU only: how fast it is has not been measured on any device. Copies are whole when
    `take` hands them out, so that the pool can use the slot again.
    """

    def __init__(self, pool: ExpertPool, device: torch.device, capacity: int) -> None:
        self.pool, self.device, self.capacity = pool, device, capacity
        self._weights: OrderedDict[Key, Weights] = OrderedDict()

    @property
    def resident(self) -> frozenset[Key]:
        """The experts on the device."""
        return frozenset(self._weights)

    def take(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Weights]]:
        """As `ExpertPool.take`, with weights on the device; those that are there first."""
        here = [expert for expert in experts if (layer, expert) in self._weights]
        for expert in here:
            self._weights.move_to_end((layer, expert))
        others = self.pool.take(layer, [expert for expert in experts if expert not in here])
        return self._hand_out(layer, here, others)

    def _hand_out(
        self, layer: int, here: Sequence[int], others: Iterator[tuple[int, Weights]]
    ) -> Iterator[tuple[int, Weights]]:
        for expert in here:
            yield expert, self._weights[layer, expert]
        for expert, (gate_up, down) in others:
            while len(self._weights) >= self.capacity:
                self._weights.popitem(last=False)
            copy = _copied(gate_up, self.device), _copied(down, self.device)
            self._weights[layer, expert] = copy
            yield expert, copy


def _copied(weight: Weight, device: torch.device) -> Weight:
    if isinstance(weight, DenseWeight):
        return DenseWeight(weight.values.to(device, copy=True))
    return type(weight)(weight.blocks.to(device, copy=True), weight.scales.to(device, copy=True))
