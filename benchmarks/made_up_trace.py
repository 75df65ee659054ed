"""A trace of any size in the form of a real one; shared with the tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_surgery.quality.routing_trace import ModelTrace, Trace

__all__ = ["made_up_trace"]


def made_up_trace(
    layers: int,
    experts: int,
    tokens: int,
    top_k: int = 8,
    plans: Sequence[tuple[str, int]] = (),
    seed: int = 0,
) -> Trace:
    """A trace in form: every token chooses experts at random, some experts more often; plans keep the first n."""
    rng = np.random.default_rng(seed)
    words = [" the", " law", "\n", " of", "(x", " =", "\t", " \u00e9t\u00e9", "", "<|end|>", " tenant", ","]
    texts = tuple(words[i] for i in rng.integers(0, len(words), tokens))

    def model(name: str, kept: int) -> ModelTrace:
        slots = min(top_k, kept)
        ids = np.empty((layers, tokens, slots), np.int32)
        weights = np.empty((layers, tokens, slots), np.float32)
        for layer in range(layers):
            logits = rng.standard_normal((tokens, kept), np.float32) + rng.standard_normal(kept, np.float32)
            chosen = np.argpartition(-logits, slots - 1, axis=1)[:, :slots]
            values = np.take_along_axis(logits, chosen, axis=1)
            order = np.argsort(-values, axis=1)
            ids[layer] = np.take_along_axis(chosen, order, axis=1)
            values = np.exp(1.5 * np.take_along_axis(values, order, axis=1))
            weights[layer] = values / values.sum(axis=1, keepdims=True)
        kl = np.zeros(tokens) if kept == experts else rng.exponential(0.4, tokens)
        predicted = tuple(int(i) for i in rng.integers(0, len(words), tokens))
        return ModelTrace(
            name,
            "full" if kept == experts else "plan",
            (tuple(range(kept)),) * layers,
            ids,
            weights,
            rng.exponential(2.0, tokens - 1),
            kl,
            predicted,
            tuple(words[i] for i in predicted),
            rng.uniform(0, 1, tokens),
            {} if kept == experts else {"method": "reap", "domains": [name]},
        )

    models = (model("full", experts), *(model(name, kept) for name, kept in plans))
    ids = tuple(int(i) for i in rng.integers(0, 50_000, tokens))
    prompt = max(1, tokens * 3 // 4)
    return Trace(
        "gpt_oss", "example", "f" * 32, experts, top_k, ids, texts, prompt, models, {"dtype": "float32"}
    )
