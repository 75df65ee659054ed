"""What transformers' model does with texts: routes, expert outputs and logits, one token after another."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from moe_surgery.selection.statistics import ExpertStatistics
from tests.support import oracle

Tokens = Sequence[int]
Kept = Sequence[Sequence[int] | None]


@dataclass(frozen=True)
class Seen:
    """Of one text: logits float64 [tokens, vocabulary], and per layer the routes [tokens][slots] and their
    weights."""

    logits: np.ndarray
    routes: list[list[list[int]]]
    weights: list[list[list[float]]]


class Routed:
    """transformers' model, watched by hooks on its experts."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.model = oracle.load_model(folder, torch.float32)
        self.layers = self.model.model.layers

    @contextmanager
    def only(self, kept: Kept, top_k: int | None = None) -> Iterator[None]:
        """Within the block, layer i routes to `kept[i]` alone (None: to all, as the model does)."""
        routers = [layer.mlp.router for layer in self.layers]
        before = [(router.bias.detach().clone(), router.top_k) for router in routers]
        try:
            for router, experts in zip(routers, kept, strict=True):
                if experts is not None:
                    dropped = torch.ones(router.num_experts, dtype=torch.bool)
                    dropped[list(experts)] = False
                    router.bias.data[dropped] = -torch.inf
                    router.top_k = min(top_k or router.top_k, len(experts))
            yield
        finally:
            for router, (bias, most) in zip(routers, before, strict=True):
                router.bias.data.copy_(bias)
                router.top_k = most

    def see(self, tokens: Tokens) -> Seen:
        """One text by itself."""
        seen: list[list[torch.Tensor]] = []
        handles = [
            layer.mlp.experts.register_forward_hook(
                lambda _m, args, kwargs, _o: seen.append([*args, *kwargs.values()][1:3]),
                with_kwargs=True,
            )
            for layer in self.layers
        ]
        with torch.no_grad():
            logits = self.model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
        for handle in handles:
            handle.remove()
        routes, weights = ([layer[i].tolist() for layer in seen] for i in (0, 1))
        return Seen(logits.double().numpy(), routes, weights)

    def statistics(self, sequences: Sequence[Tokens], layer: int | None = None) -> list[ExpertStatistics]:
        """What every expert did on a left-padded batch, of all layers or of one."""
        watched = range(len(self.layers)) if layer is None else [layer]
        experts, hidden = self.layers[0].mlp.router.weight.shape
        result = {number: ExpertStatistics.zeros(experts, hidden) for number in watched}
        longest = max(map(len, sequences))
        ids = torch.tensor([[0] * (longest - len(s)) + list(s) for s in sequences])
        real = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences])

        def hook(number: int):  # type: ignore[no-untyped-def]
            def watch(module, args, kwargs, _output) -> None:  # type: ignore[no-untyped-def]
                x, ids, weights = [*args, *kwargs.values()][:3]
                x = x.reshape(-1, hidden)
                for t in torch.where(real.flatten() == 1)[0].tolist():
                    for expert, g in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
                        h = x[t] @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
                        z = module._apply_gate(h[None])[0]
                        f = (z @ module.down_proj[expert] + module.down_proj_bias[expert]).double()
                        add(result[number], expert, g, f.numpy())

            return watch

        handles = [
            self.layers[n].mlp.experts.register_forward_hook(hook(n), with_kwargs=True) for n in watched
        ]
        with torch.no_grad():
            self.model(ids, attention_mask=real, use_cache=False)
        for handle in handles:
            handle.remove()
        return [result[number] for number in watched]

    def sequential(
        self, sequences: Sequence[Tokens], kept: Sequence[Sequence[int]], top_k: int | None = None
    ) -> list[ExpertStatistics]:
        """The same, each layer after earlier layers that have the experts `kept` alone."""
        result = []
        for number in range(len(self.layers)):
            masks = [row if n < number else None for n, row in enumerate(kept)]
            with self.only(masks, top_k):
                result += self.statistics(sequences, number)
        return result


def add(found: ExpertStatistics, expert: int, gate: float, output: np.ndarray) -> None:
    """One route more."""
    size = float(np.sqrt((output * output).sum()))
    found.count[expert] += 1
    found.gate[expert] += gate
    found.norm[expert] += size
    found.weighted_norm[expert] += gate * size
    found.output[expert] += output
    found.peak_abs[expert] = max(found.peak_abs[expert], abs(output).max())
    found.peak[expert] = max(found.peak[expert], output.max())


def assert_same(
    actual: Sequence[ExpertStatistics], expected: Sequence[ExpertStatistics], rtol: float = 1e-5
) -> None:
    """Equal counts, and sums that differ by at most `rtol`, or by a tenth of that of the layer's largest."""
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a.count, b.count)
        for name in ("gate", "norm", "weighted_norm", "peak_abs", "peak"):
            expected_sums = getattr(b, name)
            atol = rtol / 10 * float(np.abs(expected_sums).max())
            np.testing.assert_allclose(getattr(a, name), expected_sums, rtol=rtol, atol=atol)
        # Components of a sum may cancel: the error is relative to the norm of the whole.
        size = np.linalg.norm(b.output, axis=1)
        assert np.all(np.linalg.norm(a.output - b.output, axis=1) <= rtol * size)
