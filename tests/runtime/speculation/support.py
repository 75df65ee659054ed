"""What the tests of speculation share: generated texts, and exact distributions by brute force."""

from __future__ import annotations

import inspect as source_of
import itertools
import random
import textwrap

import numpy as np
import torch

from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.sampling import Sampling, distribution


def arithmetic(seed: int, questions: int) -> str:
    """Sums as the embedded model has learnt them, the last one open."""
    rng = random.Random(seed)
    pairs = [(rng.randrange(2, 60), rng.randrange(2, 60)) for _ in range(questions + 1)]
    lines = [f"Question: What is {a} + {b}?\nAnswer: {a} + {b} = {a + b}.\n" for a, b in pairs[:-1]]
    a, b = pairs[-1]
    return "".join(lines) + f"Question: What is {a} + {b}?\nAnswer:"


def program(characters: int) -> str:
    """The beginning of a module of the running Python."""
    return source_of.getsource(textwrap)[:characters]


def sequence_probabilities(model: CausalLM, prompt: list[int], length: int, sampling: Sampling) -> np.ndarray:
    """The probability of every continuation of `length` tokens, float64 [vocabulary] * length."""
    size = model.config.vocab_size
    result = np.ones(())
    for i in range(length):
        contexts = [prompt + list(c) for c in itertools.product(range(size), repeat=i)]
        logits = model(torch.tensor(contexts), logits_to_keep=1)[:, -1]
        rows = distribution(logits, sampling).double().numpy()
        result = result[..., None] * rows.reshape(*[size] * (i + 1))
    return result
