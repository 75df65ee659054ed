"""Cross-entropy of a model on texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_surgery.errors import UsageError
from moe_surgery.runtime.model import CausalLM

__all__ = ["cross_entropy"]


def cross_entropy(model: CausalLM, tokens: Sequence[int]) -> float:
    """Mean negative log-likelihood in nats of tokens[1:], each given all before it.

    Raises UsageError for fewer than two tokens, or more than the model's context.
    """
    if len(tokens) < 2:
        raise UsageError("a loss needs at least two tokens")
    ids = torch.tensor([list(tokens)], dtype=torch.int64, device=model.device)
    predicted = torch.log_softmax(model(ids[:, :-1]), dim=-1)
    return -float(predicted.gather(-1, ids[:, 1:, None]).mean())
