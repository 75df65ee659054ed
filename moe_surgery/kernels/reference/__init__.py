"""Plain PyTorch: runs on CPU, MPS, CUDA and anything else, and specifies what the others compute."""

from __future__ import annotations

from torch import Tensor

from moe_surgery.kernels.reference.dense import TorchDense
from moe_surgery.kernels.reference.experts import experts
from moe_surgery.kernels.reference.route import route
from moe_surgery.kernels.weights import ExpertWeights

__all__ = ["ReferenceBackend"]


class ReferenceBackend(TorchDense):
    """See `moe_surgery.kernels.interface.Backend`."""

    name = "reference"

    def route(self, x: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        return route(x, weight, bias, top_k)

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, expert_weights: ExpertWeights) -> Tensor:
        return experts(x, ids, weights, expert_weights)
