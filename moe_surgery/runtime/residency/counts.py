"""What a pool did: hits, misses and bytes, by layer."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

__all__ = ["Counts"]


@dataclass(slots=True)
class LayerCounts:
    """Experts that a layer asked for, each once a step: `there` in memory, `ahead` because they were read ahead (or
    were being read), `missed`. `wrong` were read ahead and not asked for. `nbytes` are all that were read."""

    there: int = 0
    ahead: int = 0
    missed: int = 0
    wrong: int = 0
    nbytes: int = 0


class Counts:
    """`LayerCounts` of every layer; subtract an earlier copy to get those since."""

    def __init__(self, layers: int) -> None:
        self.layers = [LayerCounts() for _ in range(layers)]

    def copy(self) -> Counts:
        other = Counts(0)
        other.layers = [replace(layer) for layer in self.layers]
        return other

    def since(self, earlier: Counts) -> Counts:
        """What was counted after `earlier`, a copy of this."""
        other = Counts(0)
        other.layers = [
            LayerCounts(*(getattr(now, f.name) - getattr(then, f.name) for f in fields(LayerCounts)))
            for now, then in zip(self.layers, earlier.layers, strict=True)
        ]
        return other

    def total(self, name: str) -> int:
        """The sum of one of the counts over all layers."""
        return sum(getattr(layer, name) for layer in self.layers)

    @property
    def hit_rates(self) -> list[float]:
        """Per layer the share of experts that were in memory without being read for this step."""
        return [hit_rate(layer) for layer in self.layers]

    @property
    def hit_rate(self) -> float:
        """The same over all layers."""
        asked = self.total("there") + self.total("ahead") + self.total("missed")
        return self.total("there") / asked if asked else float("nan")

    @property
    def guess_precision(self) -> float:
        """The share of experts read ahead that were then asked for."""
        guesses = self.total("ahead") + self.total("wrong")
        return self.total("ahead") / guesses if guesses else float("nan")


def hit_rate(layer: LayerCounts) -> float:
    asked = layer.there + layer.ahead + layer.missed
    return layer.there / asked if asked else float(np.nan)
