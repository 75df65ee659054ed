"""What transformers' whole model of any family does with texts, token by token: the oracle for running by layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from moe_surgery.selection.statistics import ExpertStatistics
from tests.support.routed import add


def experts_modules(model: torch.nn.Module) -> dict[int, Any]:
    """The modules of stacked experts, by layer."""
    found = {}
    for name, module in model.named_modules():
        down = getattr(module, "down_proj", None)
        if isinstance(down, torch.nn.Parameter) and down.ndim == 3 and not re.search("vis|shared", name):
            found[int(name.partition(".layers.")[2].partition(".")[0])] = module
    return found


def _llama4(module: Any, x: torch.Tensor, expert: int) -> torch.Tensor:
    gate, up = (x @ module.gate_up_proj[expert]).chunk(2, dim=-1)
    return (up * module.act_fn(gate)) @ module.down_proj[expert]


def statistics(
    model: torch.nn.Module, sequences: Sequence[Sequence[int]], experts: int
) -> list[ExpertStatistics]:
    """Every expert's statistics over `sequences`, each run by itself; layers in order."""
    modules = experts_modules(model)
    result: dict[int, ExpertStatistics] = {}

    def watch(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, _: Any) -> None:
            x, ids, weights = [*args, *kwargs.values()][:3]
            x = x.reshape(-1, x.shape[-1])
            found = result.setdefault(layer, ExpertStatistics.zeros(experts, x.shape[-1]))
            for t in range(len(x)):
                for expert, gate in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
                    if expert < experts:
                        twice = torch.tensor([[expert, expert]])
                        f = type(module).forward(module, x[t : t + 1], twice, torch.tensor([[1.0, 0.0]]))[0]
                        add(found, expert, gate, f.double().numpy())

        return hook

    def watch_llama4(layer: int, moe: Any) -> Any:
        def hook(_: Any, args: Any, out: Any) -> None:
            x, scores = args[0], out[0]
            found = result.setdefault(layer, ExpertStatistics.zeros(experts, x.shape[-1]))
            for t in range(len(x)):
                for expert in scores[t].nonzero()[:, 0].tolist():
                    gate = float(scores[t, expert])
                    f = _llama4(moe.experts, scores[t, expert] * x[t], expert).double().numpy()
                    size = float(np.linalg.norm(f))
                    add(found, expert, gate, f)
                    found.weighted_norm[expert] += size - gate * size  # the output is added as it is

        return hook

    handles = []
    for layer, module in modules.items():
        if type(module).__name__ == "Llama4TextExperts":
            moe = next(m for m in model.modules() if getattr(m, "experts", None) is module)
            handles.append(moe.router.register_forward_hook(watch_llama4(layer, moe)))
        else:
            handles.append(module.register_forward_hook(watch(layer), with_kwargs=True))
    with torch.no_grad():
        for sequence in sequences:
            model(input_ids=torch.tensor([list(sequence)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return [result[layer] for layer in sorted(result)]
