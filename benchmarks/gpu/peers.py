"""What one MoE layer is timed beside: implementations of others, where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_surgery.kernels.reference.experts import swiglu
from moe_surgery.kernels.weights import DenseWeight, ExpertWeights, Mxfp4Weight

__all__ = ["TRANSFORMERS", "grouped_4bit", "transformers_layer"]

# Implementation -> whether its work can be captured in a graph (eager asks the device which experts it needs).
TRANSFORMERS = {"eager": False, "batched_mm": True, "grouped_mm": True}
Call = Callable[[Tensor], Tensor]


def transformers_layer(experts: ExpertWeights, router: tuple[Tensor, Tensor], top_k: int, name: str) -> Call:
    """transformers' gpt-oss MoE layer over BF16 weights, which are used as stored. ImportError without it."""
    from transformers import GptOssConfig
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: F401 - an old version has none
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    up, down = experts.gate_up, experts.down
    assert isinstance(up, DenseWeight)
    assert isinstance(down, DenseWeight)
    count, hidden, _ = up.values.shape
    config = GptOssConfig(
        num_local_experts=count, hidden_size=hidden, intermediate_size=hidden, num_experts_per_tok=top_k
    )
    config._experts_implementation = name
    with torch.device("meta"):
        layer: Any = GptOssMLP(config)
    state_dict = {
        "router.weight": router[0], "router.bias": router[1],
        "experts.gate_up_proj": up.values, "experts.gate_up_proj_bias": experts.gate_up_bias,
        "experts.down_proj": down.values, "experts.down_proj_bias": experts.down_bias,
    }  # fmt: skip
    layer.load_state_dict(state_dict, assign=True)
    layer.eval().requires_grad_(False)
    return lambda x: layer(x[None])[0][0]


def grouped_4bit(experts: ExpertWeights, ids: Tensor, weights: Tensor) -> Call:
    """The grouped MXFP4 product of the package grouped-nf4-gemm; bias, SwiGLU and the sum in PyTorch.

    It wants group sizes on the host, so routing is done beforehand and not timed: in its favour.
    ImportError where the package is not installed.
    """
    from mxfp4_grouped import gemm_mxfp4_grouped

    up, down = experts.gate_up, experts.down
    assert isinstance(up, Mxfp4Weight)
    assert isinstance(down, Mxfp4Weight)
    order = torch.argsort(ids.flatten(), stable=True)
    rows, expert_ids = order // ids.shape[1], ids.flatten()[order]
    chosen, counts = torch.unique(expert_ids, return_counts=True)
    sizes, numbers = counts.tolist(), chosen.tolist()
    share = weights.flatten()[order][:, None].float()

    def run(x: Tensor) -> Tensor:
        h = gemm_mxfp4_grouped(x[rows], up.blocks.flatten(2), up.scales, sizes, numbers)
        z = swiglu(h + experts.gate_up_bias[expert_ids], experts.limit, experts.alpha)
        out = gemm_mxfp4_grouped(z, down.blocks.flatten(2), down.scales, sizes, numbers)
        out = (out + experts.down_bias[expert_ids]).float() * share
        return torch.zeros(x.shape, device=x.device).index_add_(0, rows, out).to(x.dtype)

    return run
