"""A layer's q, k and v joined into one tensor, which the decode step reads in one launch."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from moe_surgery.kernels.q8_0 import Matrix, as_stored
from moe_surgery.kernels.weights import Layer, Projection

__all__ = ["bias_of", "join_qkv"]


def join_qkv(layer: Layer) -> Layer:
    """`layer` with q, k and v as views of one weight [rows, hidden] and one bias [rows].

    `layer` itself where they already are. A projection without a bias gets one of zeros.
    """
    parts = (layer.q, layer.k, layer.v)
    matrices = [as_stored(p.weight, "triton") for p in parts]
    if _adjacent(matrices) and _adjacent([bias_of(p) for p in parts]):
        return layer
    rows = [len(m) for m in matrices]
    weights = torch.split(torch.cat(matrices), rows)
    biases = torch.split(torch.cat([bias_of(p) for p in parts]), rows)
    q, k, v = (Projection(w, b) for w, b in zip(weights, biases, strict=True))
    return replace(layer, q=q, k=k, v=v)


def bias_of(projection: Projection[Matrix]) -> Tensor:
    """The bias [rows], zeros where there is none."""
    weight = as_stored(projection.weight, "triton")
    return weight.new_zeros(len(weight)) if projection.bias is None else projection.bias


def _adjacent(parts: list[Tensor]) -> bool:
    """Whether the tensors are adjacent in one storage, in order."""
    storage = parts[0].untyped_storage().data_ptr()
    return all(
        later.untyped_storage().data_ptr() == storage
        and later.data_ptr() == earlier.data_ptr() + earlier.nbytes
        and later.is_contiguous()
        for earlier, later in pairwise(parts)
    )
