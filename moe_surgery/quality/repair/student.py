"""The pruned model with its small tensors: divergence from the full model on batches, and its gradient.

A batch goes through the layers one after another, keeping each layer's input alone; on the way back a layer is
computed once more, with a graph for its gradient. Memory holds one layer's graph, a batch's hidden states once a
layer, and the small tensors. Of a small model the graphs are kept instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from moe_surgery.families.base import WeightNames
from moe_surgery.kernels.differentiable import DifferentiableBackend
from moe_surgery.quality.layerwise import attend_within
from moe_surgery.quality.repair.parameters import SmallTensors
from moe_surgery.quality.repair.samples import Sample, token_batches
from moe_surgery.quality.repair.targets import Targets, divergence, predicting_rows
from moe_surgery.runtime.decoder_layer import decoder_layer
from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.view import view
from moe_surgery.selection.plan import Plan

__all__ = ["Student"]

LOGIT_BYTES = 256 << 20
"""Logits of as many rows at a time: the vocabulary's table is cast to float32 twice for each."""
QUERIES = 128
"""Of attention at a time: plain PyTorch computes masked scores as well."""
KEPT_GRAPH_BYTES = 256 << 20
"""Graphs of all layers that are kept; where they are larger, a layer is computed again for its gradient."""


class Student:
    """The view of `full` that `plan` prunes it to, computed in float32 by `DifferentiableBackend`."""

    def __init__(self, full: CausalLM, plan: Plan, names: WeightNames, *, norms: bool) -> None:
        self.backend = DifferentiableBackend()
        self.model = copy(view(full, plan))
        self.model.backend, self.model.dtype = self.backend, torch.float32
        self.tensors = SmallTensors(self.model, names, norms=norms)

    def embed(self, samples: Sequence[Sample]) -> Tensor:
        """Hidden states [tokens, hidden] before the first layer, passages one after another."""
        ids = [token for sample in samples for token in sample.tokens]
        return self.model.embed(torch.tensor(ids, device=self.model.device))

    def apply(self, number: int, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """Hidden states after layer `number`, of passages of `lengths` tokens."""
        layer = self.tensors.layer(number, self.model.layers[number])
        positions = torch.cat([torch.arange(n, device=x.device) for n in lengths])
        cos, sin = self.model.rope(positions, self.backend)
        window = self.model.config.sliding_windows[number]
        attend = attend_within(self.backend, lengths, layer.sinks, window, QUERIES)
        return decoder_layer(self.backend, self.model.config, layer, x, cos, sin, attend)

    def logits(self, x: Tensor) -> Tensor:
        """Logits float32 [rows, vocabulary] of hidden states after the last layer."""
        c = self.model.config
        x = self.backend.rms_norm(x, self.tensors.norm(self.model), c.rms_norm_eps)
        return self.backend.linear(x, self.model.unembedding).float()

    def divergence_and_gradient(self, samples: Sequence[Sample], targets: Targets) -> float:
        """Mean KL divergence over what `samples` predict; its gradient is added to those of the small tensors."""
        lengths = [len(s.tokens) for s in samples]
        keep = self._graph_bytes(sum(lengths)) <= KEPT_GRAPH_BYTES
        inputs, outputs = [], []
        x = self.embed(samples)
        for number in range(len(self.model.layers)):
            x = x.detach().requires_grad_(number > 0)
            inputs.append(x)
            with torch.set_grad_enabled(keep):
                x = self.apply(number, x, lengths)
            outputs.append(x if keep else None)
        total, gradient = self._last(x, samples, targets)
        for number in reversed(range(len(inputs))):
            x, y = inputs.pop(), outputs.pop()
            if y is None:
                with torch.enable_grad():
                    y = self.apply(number, x, lengths)
            y.backward(gradient)  # type: ignore[no-untyped-call]
            if number:
                assert x.grad is not None
                gradient = x.grad
        return total

    def _graph_bytes(self, tokens: int) -> int:
        """About what the graphs of all layers take."""
        c = self.model.config
        widths = (
            c.hidden_size + c.num_attention_heads * c.head_dim + c.num_experts_per_tok * c.intermediate_size
        )
        return 40 * tokens * widths * len(self.model.layers)

    def _last(self, x: Tensor, samples: Sequence[Sample], targets: Targets) -> tuple[float, Tensor]:
        """Mean divergence of the predictions from `x`, after the last layer, and its gradient to `x`."""
        rows = predicting_rows(samples).to(x.device)
        gradient = torch.zeros_like(x)
        total = 0.0
        for piece, wanted in self._pieces(rows, targets.of(samples)):
            h = x[piece].detach().requires_grad_()
            with torch.enable_grad():
                loss = divergence(self.logits(h), wanted).sum() / len(rows)
            loss.backward()  # type: ignore[no-untyped-call]
            assert h.grad is not None
            gradient[piece] = h.grad
            total += float(loss.detach())
        return total, gradient

    def _pieces(self, rows: Tensor, targets: Targets) -> list[tuple[Tensor, Targets]]:
        step = max(1, LOGIT_BYTES // (self.model.config.vocab_size * 4))
        return [
            (piece, targets[slice(i * step, i * step + len(piece))].to(rows.device))
            for i, piece in enumerate(torch.split(rows, step))
        ]

    @torch.no_grad()
    def divergences(self, samples: Sequence[Sample], targets: Targets, batch_tokens: int) -> Tensor:
        """Sum of the KL divergence over what each sample predicts: float64 [samples]."""
        sums = []
        for batch in token_batches(samples, batch_tokens):
            x, lengths = self.embed(batch), [len(s.tokens) for s in batch]
            for number in range(len(self.model.layers)):
                x = self.apply(number, x, lengths)
            rows = predicting_rows(batch).to(x.device)
            kl = [
                divergence(self.logits(x[p]), wanted) for p, wanted in self._pieces(rows, targets.of(batch))
            ]
            by_sample = torch.split(torch.cat(kl).cpu().double(), [s.count for s in batch])
            sums += [part.sum() for part in by_sample]
        return torch.stack(sums)
