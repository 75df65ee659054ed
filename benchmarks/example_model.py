"""The embedded model in training: transformers' gpt-oss layers, with experts fast to train on a CPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GptOssConfig, GptOssForCausalLM

from benchmarks.example_texts import BOS, EOS, RETURN, VOCABULARY
from moe_surgery.formats import mxfp4

__all__ = ["EXPERTS", "LAYERS", "Mlp", "build", "config", "mxfp4_encode"]

LAYERS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 4, 32, 4, 160, 160
PADDING = 64  # rows of an expert's product are a multiple


def config() -> dict[str, Any]:
    """The model's config.json, with gpt-oss-20b's keys."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "bos_token_id": BOS,
        "eos_token_id": RETURN,
        "experts_per_token": TOP_K,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initial_context_length": 512,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        "max_position_embeddings": 4096,
        "model_type": "gpt_oss",
        "num_attention_heads": 8,
        "num_experts_per_tok": TOP_K,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 2,
        "num_local_experts": EXPERTS,
        "output_router_logits": False,
        "pad_token_id": EOS,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "original_max_position_embeddings": 512,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 64,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": VOCABULARY,
    }


class RoundToMxfp4(torch.autograd.Function):
    """Weights [E, inputs, outputs] as MXFP4 stores them; gradients pass unchanged."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor) -> Tensor:
        return torch.stack([mxfp4_values(*mxfp4_encode(w)) for w in weights.detach()])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def mxfp4_encode(weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Blocks u8 [outputs, inputs / 32, 16] and scales u8 [outputs, inputs / 32] of [inputs, outputs]."""
    bits = weight.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
    blocks, scales, _ = mxfp4.encode_transposed(bits)
    return blocks, scales


def mxfp4_values(blocks: np.ndarray, scales: np.ndarray) -> Tensor:
    """The values of `mxfp4_encode`'s result as BF16 [inputs, outputs]."""
    return torch.from_numpy(mxfp4.decode_transposed(blocks, scales)).view(torch.bfloat16)


@torch.compile(dynamic=True)
def activation(gate_up: Tensor) -> Tensor:
    """gpt-oss's clamped SwiGLU, alpha 1.702, limit 7, of gates in the first half and the rest in the second."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=7.0)
    up = up.clamp(min=-7.0, max=7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


class Mlp(nn.Module):
    """A layer's router and experts under transformers' parameter names, fast to train on a CPU."""

    def __init__(self, router: Any, experts: Any) -> None:
        super().__init__()
        self.router: Any = router
        self.experts: Any = experts
        self.rounded = False
        self.allowed: Tensor | None = None  # bool [sequences, EXPERTS]
        self.probabilities = torch.empty(0)
        self.chosen = torch.empty(0)

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        sequences, length, width = hidden.shape
        flat = hidden.reshape(-1, width)
        with torch.autocast("cpu", enabled=False):
            logits = functional.linear(flat.float(), self.router.weight, self.router.bias)
        self.probabilities = logits.softmax(-1).view(sequences, length, EXPERTS)
        if self.allowed is not None:
            mask = self.allowed[:, None, :].expand(-1, length, -1).reshape(-1, EXPERTS)
            logits = logits.masked_fill(~mask, -math.inf)
        top, chosen = logits.topk(TOP_K, dim=-1)
        self.chosen = chosen
        return self._experts(flat, chosen, top.softmax(-1)).view(sequences, length, width), None

    def _experts(self, flat: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        e = self.experts
        gate_up, down = e.gate_up_proj, e.down_proj
        if self.rounded:
            gate_up, down = RoundToMxfp4.apply(gate_up), RoundToMxfp4.apply(down)
        slots, counts = padded_slots(chosen)
        slots_or_zero = slots.clamp(min=0)
        tokens = slots_or_zero // TOP_K
        inputs = flat.to(torch.bfloat16).index_select(0, tokens)
        gate_up = torch.cat([gate_up[..., ::2], gate_up[..., 1::2]], dim=-1)
        bias = torch.cat([e.gate_up_proj_bias[..., ::2], e.gate_up_proj_bias[..., 1::2]], dim=-1)
        middle = activation(linear_by_expert(inputs, counts, gate_up, bias))
        outputs = linear_by_expert(middle, counts, down, e.down_proj_bias)
        share = shares.flatten().index_select(0, slots_or_zero) * (slots >= 0)
        result = torch.zeros(flat.shape, dtype=torch.float32)
        return result.index_add(0, tokens, outputs.float() * share[:, None])


def padded_slots(chosen: Tensor) -> tuple[Tensor, list[int]]:
    """Positions in `chosen` [T, TOP_K] grouped by expert, each group filled up to a multiple of PADDING with -1.

    Sizes of products that come again and again spare oneDNN the making of a kernel for each.
    """
    flat = chosen.flatten()
    counts = flat.bincount(minlength=EXPERTS)
    padded = (counts + PADDING - 1) // PADDING * PADDING
    slots = torch.full((int(padded.sum()),), -1)
    experts = flat[order := flat.argsort(stable=True)]
    offsets = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    slots[torch.arange(len(order)) + offsets[experts]] = order
    return slots, padded.tolist()


def linear_by_expert(inputs: Tensor, counts: list[int], weights: Tensor, biases: Tensor) -> Tensor:
    """BF16 products of groups of rows with their experts' weights [E, inputs, outputs]."""
    groups = zip(inputs.split(counts), weights.bfloat16().unbind(0), biases.bfloat16().unbind(0), strict=True)
    return torch.cat([x @ w + b for x, w, b in groups])


def build(seed: int) -> tuple[GptOssForCausalLM, list[Mlp]]:
    """A new model with transformers' initial values, its mixture layers replaced by `Mlp`."""
    torch.manual_seed(seed)
    fields = {k: v for k, v in config().items() if k not in ("quantization_config", "torch_dtype")}
    fields["attn_implementation"] = "eager"
    model = GptOssForCausalLM(GptOssConfig(**fields)).float()
    for layer in model.model.layers:
        nn.init.normal_(layer.mlp.router.weight, std=0.02)
        nn.init.zeros_(layer.mlp.router.bias)
        nn.init.normal_(layer.mlp.experts.gate_up_proj, std=0.06)
        nn.init.normal_(layer.mlp.experts.down_proj, std=0.04)
        nn.init.zeros_(layer.mlp.experts.gate_up_proj_bias)
        nn.init.zeros_(layer.mlp.experts.down_proj_bias)
        nn.init.zeros_(layer.self_attn.sinks)
        layer.mlp = Mlp(layer.mlp.router, layer.mlp.experts)
    nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    return model, [layer.mlp for layer in model.model.layers]
