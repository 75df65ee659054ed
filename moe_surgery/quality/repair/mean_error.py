"""The first step, without gradients: each layer's error, by least squares, into the biases of its experts.

A token's output is the sum of its experts' outputs times routing weights that sum to one. A vector b_j added to the
bias of every expert j adds sum_j g_j b_j: the same vector b for all experts adds b. So the mean error of a layer can
be removed exactly, and what depends on the experts chosen in part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_surgery.quality.hidden_states import HiddenStates
from moe_surgery.quality.layerwise import apply_attention, apply_experts, embed
from moe_surgery.quality.repair.samples import Sample
from moe_surgery.quality.repair.student import Student
from moe_surgery.runtime.decoder_layer import moe_block
from moe_surgery.runtime.model import CausalLM

__all__ = ["bias_shifts", "shift_biases"]

RIDGE = 0.03


def bias_shifts(gates: Tensor, error: Tensor, ridge: float = RIDGE) -> Tensor:
    """What to add to the biases, float64 [experts, hidden], for `error` [tokens, hidden] and routing weights `gates`
    [tokens, experts] (0 where not chosen).

    m + argmin_B |G B - (E - m)|^2 + ridge * tokens / experts * |B|^2 with m the mean error: an expert that few
    tokens choose gets little more than the mean.
    """
    g, e = gates.double(), error.double()
    mean = e.mean(dim=0)
    tokens, experts = g.shape
    gram = g.T @ g + ridge * tokens / experts * torch.eye(experts, dtype=torch.float64, device=g.device)
    shifts: Tensor = mean + torch.linalg.solve(gram, g.T @ (e - mean))
    return shifts


@torch.inference_mode()
def shift_biases(full: CausalLM, student: Student, samples: Sequence[Sample], ridge: float = RIDGE) -> None:
    """Add to the student's down biases, layer by layer, what brings its hidden states closest to the full model's.

    A layer's error is that of the hidden states after it, with earlier layers already corrected.
    """
    tensors = student.tensors
    theirs = embed(full, [s.tokens for s in samples])
    ours = embed(student.model, [s.tokens for s in samples])
    for number in range(len(full.layers)):
        apply_attention(full, number, full.layers[number], theirs)
        apply_experts(full, full.layers[number], theirs)
        layer = tensors.layer(number, student.model.layers[number])
        apply_attention(student.model, number, layer, ours)
        gates = _apply_experts(student, number, ours)
        error = torch.cat([(theirs[p].float() - ours[p]) for p in ours.pieces()])
        shifts = bias_shifts(gates, error, ridge).float()
        tensors.values[tensors.layer_names.down_bias.format(layer=number)] += shifts
        for piece in ours.pieces():
            ours[piece] = ours[piece] + gates[piece] @ shifts


def _apply_experts(student: Student, number: int, states: HiddenStates) -> Tensor:
    """Add the experts' outputs to `states`; the routing weights by kept expert, [tokens, kept]."""
    layer = student.tensors.layer(number, student.model.layers[number])
    rows = []
    for piece in states.pieces():
        states[piece], ids, weights = moe_block(student.backend, student.model.config, layer, states[piece])
        gates = torch.zeros(len(ids), len(layer.router.weight), device=ids.device)
        rows.append(gates.scatter(1, ids, weights))
    return torch.cat(rows)
