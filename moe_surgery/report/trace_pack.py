"""Routes as compressed bytes: a page of many layers, experts and tokens has to stay small.

A model's bytes, before compression (zlib) and base64, over layers, tokens and slots in this order:

- for each layer and token, one byte: which slot has the largest weight;
- the weights, as round(levels x sqrt(weight)): a byte each with 255 levels, or two in a byte with 15, the first
  in the low half;
- the experts: slots are sorted by expert number, and each is stored as the gap to the one before (minus one), as
  one byte per 255 and one for the rest.
"""

from __future__ import annotations

import base64
import zlib

import numpy as np
import numpy.typing as npt

from moe_surgery.quality.routing_trace import ModelTrace

__all__ = ["LEVELS", "pack_routes", "slots"]

Bytes = npt.NDArray[np.uint8]
# Of a weight, finest first.
LEVELS = (255, 15)


def slots(model: ModelTrace) -> list[int]:
    """The experts per token of each layer."""
    return [int(n) for n in (model.experts[:, 0] >= 0).sum(axis=1)]


def pack_routes(model: ModelTrace, tokens: int, levels: int) -> str:
    """The routes of the first `tokens` tokens, base64."""
    ids = model.experts[:, :tokens].astype(np.int64)
    valid = ids >= 0
    by_number = np.argsort(np.where(valid, ids, np.iinfo(np.int64).max), axis=2, kind="stable")
    valid = np.take_along_axis(valid, by_number, axis=2)
    ids = np.take_along_axis(ids, by_number, axis=2)
    weights = np.take_along_axis(model.weights[:, :tokens], by_number, axis=2)
    first = (by_number == 0).argmax(axis=2).astype(np.uint8)
    gaps = np.diff(ids, axis=2, prepend=-1) - 1
    rounded = np.rint(levels * np.sqrt(np.clip(weights[valid], 0, 1))).astype(np.uint8)
    raw = first.tobytes() + _packed(rounded, levels).tobytes() + _escaped(gaps[valid]).tobytes()
    return base64.b64encode(zlib.compress(raw, 9)).decode()


def _packed(values: Bytes, levels: int) -> Bytes:
    if levels > 15:
        return values
    values = np.append(values, np.zeros(len(values) % 2, np.uint8))
    packed: Bytes = values[::2] | (values[1::2] << 4).astype(np.uint8)
    return packed


def _escaped(gaps: npt.NDArray[np.int64]) -> Bytes:
    """Each gap as one 255 for every 255 in it, and the rest."""
    ends = np.cumsum(gaps // 255 + 1) - 1
    out = np.full(ends[-1] + 1, 255, np.uint8)
    out[ends] = gaps % 255
    return out
