"""The experts kernels inside transformers models.

    from moe_surgery.integrations.transformers import register, replace_experts

    register()  # weights in BF16: one argument chooses the kernels
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="moe_surgery")

    replace_experts(model, folder)  # weights in MXFP4: replaces the modules

On CUDA the triton backend computes if it works, else plain PyTorch; the logger `moe_surgery` says which
and why. Both can be trained through: gradients go to the input, the routing weights and the biases, and to
weights in BF16; packed ones stay frozen.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.errors import PlanMismatchError, UsageError
from moe_surgery.families import FAMILIES, AnyFamily, ModelSpec, identify_model
from moe_surgery.integrations import ops  # noqa: F401  # registers torch.ops.moe_surgery
from moe_surgery.kernels.reference.experts import swiglu
from moe_surgery.runtime.mapped import MappedShards

__all__ = ["NAME", "PackedExperts", "PackedMLP", "register", "replace_experts"]

NAME = "moe_surgery"
log = logging.getLogger("moe_surgery")
# Classes whose gate is the clamped SwiGLU, as tried.
_checked: set[type] = set()


def register() -> None:
    """Register `experts_implementation="moe_surgery"` with transformers; can be called again.

    Raises UsageError if transformers is missing or too old to have an experts interface.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        raise UsageError(
            "transformers with an experts interface is not installed: pip install 'transformers>=5'"
        ) from None
    ALL_EXPERTS_FUNCTIONS.register(NAME, _experts_forward)


def _experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Replaces the forward of an experts module.

    hidden_states [tokens, hidden], the other two [tokens, top_k]; returns [tokens, hidden].
    """
    _check_form(module)
    gate_up, down = module.gate_up_proj, module.down_proj
    if not module.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    output: Tensor = torch.ops.moe_surgery.experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        gate_up,
        module.gate_up_proj_bias,
        down,
        module.down_proj_bias,
        float(module.limit),
        float(module.alpha),
    )
    return output


def _check_form(module: Any) -> None:
    """Raise UsageError unless `module` computes like gpt-oss's experts: biases, interleaved rows, the
    clamped SwiGLU. The gate is tried once per class, outside of compilation."""
    name = type(module).__name__
    mismatches = [
        text
        for text, fits in (
            ("has no gate", module.has_gate),
            ("has no biases", module.has_bias),
            ("stores gate and up rows separately instead of interleaved", not module.is_concatenated),
            ("normalises each expert's output", not getattr(module, "has_post_expert_norm", False)),
            ("is sharded by experts", not getattr(module, "_is_expert_parallel", False)),
            ("has no limit and alpha", hasattr(module, "limit") and hasattr(module, "alpha")),
        )
        if not fits
    ]
    if mismatches:
        raise UsageError(
            f'experts_implementation="{NAME}": {name} {mismatches[0]}; choose another implementation'
        )
    if torch.compiler.is_compiling() or type(module) in _checked:
        return
    probe = torch.linspace(-20, 20, 64).view(4, 16)
    if not torch.allclose(module._apply_gate(probe), swiglu(probe, module.limit, module.alpha), atol=1e-4):
        raise UsageError(
            f'experts_implementation="{NAME}": {name} has another activation; choose another implementation'
        )
    _checked.add(type(module))


class PackedExperts(nn.Module):
    """The experts of one layer, packed as stored; buffers are named as the hub names the tensors.

    gate_up_proj_blocks uint8 [experts, 2 * intermediate, hidden / 32, 16], gate_up_proj_scales uint8 without
    the last dimension, gate_up_proj_bias [experts, 2 * intermediate]; down_proj_* likewise.
    """

    gate_up_proj_blocks: Tensor
    gate_up_proj_scales: Tensor
    gate_up_proj_bias: Tensor
    down_proj_blocks: Tensor
    down_proj_scales: Tensor
    down_proj_bias: Tensor

    def __init__(self, tensors: dict[str, Tensor], limit: float, alpha: float) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.limit, self.alpha = limit, alpha

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        """[tokens, hidden] of hidden_states [tokens, hidden] and the choice [tokens, top_k]."""
        output: Tensor = torch.ops.moe_surgery.experts_mxfp4(
            hidden_states,
            router_indices,
            routing_weights,
            self.gate_up_proj_blocks,
            self.gate_up_proj_scales,
            self.gate_up_proj_bias,
            self.down_proj_blocks,
            self.down_proj_scales,
            self.down_proj_bias,
            self.limit,
            self.alpha,
        )
        return output


class PackedMLP(nn.Module):
    """A gpt-oss MoE layer over `PackedExperts`; the router stays transformers' module, so that
    recording its logits still works."""

    def __init__(self, router: nn.Module, experts: PackedExperts) -> None:
        super().__init__()
        self.router = router
        self.experts = experts

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """hidden_states [batch, tokens, hidden] -> the same shape, and the routing weights."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, scores, indices = self.router(flat)
        return self.experts(flat, indices, scores).view(hidden_states.shape), scores


def replace_experts(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    *,
    families: tuple[AnyFamily, ...] = FAMILIES,
) -> nn.Module:
    """Replace the experts of a loaded transformers gpt-oss by packed ones from `checkpoint`; returns `model`.

    The checkpoint (folder, file or cached hub id) has MXFP4 experts and is the one `model` was loaded
    from, pruned or not. On the CPU the packed weights are views of its mapped files, which must not be changed;
    on other devices they are copied tensor by tensor. The old experts are released. Biases are buffers too: to train
    them, call `requires_grad_()` on them and pass them to the optimizer. `families` are the model families to
    recognise.

    Raises UsageError for another kind of model or dense experts, PlanMismatchError if layers, experts or
    sizes differ, and any error of opening the checkpoint.
    """
    layers = _layers(model)
    with Checkpoint.open(checkpoint) as opened:
        spec = identify_model(opened, families)
        tensors = {t.name: t for t in spec.tensors}
        _check_fits(layers, spec, str(checkpoint))
        config: Any = model.config
        limit = float(getattr(config, "swiglu_limit", 7.0))
        alpha = float(getattr(config, "swiglu_alpha", 1.702))
        names = spec.described.weights.layer
        projections = (  # as transformers names them, and the names of their tensors
            ("gate_up_proj", names.gate_up, names.gate_up_bias),
            ("down_proj", names.down, names.down_bias),
        )
        shards = MappedShards(opened)
        for number, layer in enumerate(layers):
            router = layer.mlp.router
            device = router.weight.device
            buffers: dict[str, Tensor] = {}
            for projection, weight_name, bias_name in projections:
                packed, bias = (tensors[name.format(layer=number)] for name in (weight_name, bias_name))
                assert packed.scales is not None
                parts = {"blocks": packed.stored, "scales": packed.scales, "bias": bias.stored}
                for part, ref in parts.items():
                    mapped = shards.tensor(ref)
                    # Biases are small and can be trained; mapped memory cannot be written.
                    buffers[f"{projection}_{part}"] = mapped.to(device, copy=part == "bias")
                    if device.type != "cpu":
                        shards.release(ref)
            layer.mlp = PackedMLP(router, PackedExperts(buffers, limit, alpha)).train(layer.training)
    log.info("%d layers use packed experts of %s", len(layers), checkpoint)
    return model


def _layers(model: nn.Module) -> list[Any]:
    """The decoder layers of a gpt-oss. Raises UsageError for anything else."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind != "gpt_oss":
        raise UsageError(f"replace_experts: the model is {kind or type(model).__name__}, not gpt_oss")
    inner: Any = getattr(model, "model", model)
    layers = list(inner.layers)
    for number, layer in enumerate(layers):
        if not hasattr(layer.mlp, "router"):
            raise UsageError(
                f"replace_experts: layer {number} has no router; its MLP is {type(layer.mlp).__name__}"
            )
    return layers


def _check_fits(layers: list[Any], spec: ModelSpec, where: str) -> None:
    dimensions = spec.dimensions
    if not spec.expert_format.packed:
        raise UsageError(
            f'{where}: the experts are not packed in MXFP4; load with experts_implementation="{NAME}" instead'
        )
    if len(layers) != dimensions["layers"]:
        raise PlanMismatchError(f"{where}: {dimensions['layers']} layers, the model has {len(layers)}")
    expected = (dimensions["experts"], dimensions["hidden"])
    for number, layer in enumerate(layers):
        shape = tuple(layer.mlp.router.weight.shape)
        if shape != expected:
            raise PlanMismatchError(
                f"{where}: {expected[0]} experts of width {expected[1]}; "
                f"the model's layer {number} routes to {shape[0]} of width {shape[1]}"
            )
