"""Statistics gathered layer by layer against hooks on transformers' model."""

from __future__ import annotations

import random
from collections import defaultdict

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from moe_surgery import load_model  # noqa: E402
from moe_surgery.checkpoint.locate import locate  # noqa: E402
from moe_surgery.demo import arithmetic  # noqa: E402
from moe_surgery.measure.corpus import Passage  # noqa: E402
from moe_surgery.measure.profile import profile_passages  # noqa: E402
from moe_surgery.runtime.text import Text  # noqa: E402
from moe_surgery.selection.metrics import METRICS, score  # noqa: E402
from moe_surgery.selection.statistics import ExpertStatistics  # noqa: E402
from tests.support import oracle  # noqa: E402


def passages(texts: dict[str, list[list[int]]]) -> list[Passage]:
    return [Passage(domain, tuple(s)) for domain, sequences in texts.items() for s in sequences]


def by_hooks(sequences: list[list[int]]) -> list[ExpertStatistics]:
    """Every expert's tokens, one by one, from what transformers' experts are given for a padded batch."""
    model = oracle.load_model(locate("example:tiny"), torch.float32)
    layers = [ExpertStatistics.zeros(32, 160) for _ in range(4)]

    def watch(number: int) -> None:
        def hook(experts, args, kwargs, _output) -> None:  # type: ignore[no-untyped-def]
            given = [*args, *kwargs.values()]
            x, ids, weights = given[0].reshape(-1, 160), given[1], given[2]
            for t in torch.where(real.flatten() == 1)[0].tolist():
                for expert, g in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
                    h = x[t] @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
                    z = experts._apply_gate(h[None])[0]
                    f = (z @ experts.down_proj[expert] + experts.down_proj_bias[expert]).double().numpy()
                    add(layers[number], expert, g, f)

        model.model.layers[number].mlp.experts.register_forward_hook(hook, with_kwargs=True)

    for number in range(4):
        watch(number)
    longest = max(map(len, sequences))
    ids = torch.tensor([[0] * (longest - len(s)) + s for s in sequences])
    real = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences])
    with torch.no_grad():
        model(ids, attention_mask=real)
    return layers


def add(found: ExpertStatistics, expert: int, gate: float, output: np.ndarray) -> None:
    size = float(np.sqrt((output * output).sum()))
    found.count[expert] += 1
    found.gate[expert] += gate
    found.norm[expert] += size
    found.weighted_norm[expert] += gate * size
    found.output[expert] += output
    found.peak_abs[expert] = max(found.peak_abs[expert], abs(output).max())
    found.peak[expert] = max(found.peak[expert], output.max())


def test_every_statistic_is_what_hooks_on_transformers_see() -> None:
    text = Text("example:tiny")
    texts: dict[str, list[list[int]]] = defaultdict(list)
    texts["sums"] = [text.encode(arithmetic(random.Random(i), 300))[: 60 + 20 * i] for i in range(2)]
    texts["words"] = [text.encode("Experts that are never asked are left out of the file. " * 6)]
    found = profile_passages(load_model("example:tiny", dtype=torch.float32), passages(texts))
    expected = {domain: by_hooks(sequences) for domain, sequences in texts.items()}
    for domain, sequences in texts.items():
        for mine, theirs in zip(found[domain], expected[domain], strict=True):
            assert mine.count.sum() == 4 * sum(map(len, sequences))
            assert_same(mine, theirs)
        for metric in METRICS:
            for a, b in zip(score(metric, found[domain]), score(metric, expected[domain]), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5)


def assert_same(mine: ExpertStatistics, theirs: ExpertStatistics) -> None:
    np.testing.assert_array_equal(mine.count, theirs.count)
    for name in ("gate", "norm", "weighted_norm", "peak_abs", "peak"):
        np.testing.assert_allclose(getattr(mine, name), getattr(theirs, name), rtol=1e-5)
    # Components of a sum may cancel: the error is held against the length of the whole.
    size = np.linalg.norm(theirs.output, axis=1)
    assert np.all(np.linalg.norm(mine.output - theirs.output, axis=1) <= 1e-5 * size)


def test_sequences_together_are_sequences_apart() -> None:
    model = load_model("example:tiny", dtype=torch.float32)
    sequences = [[5, 80, 900, 33], [700, 8], [9, 10, 11, 12, 13, 14]]
    [whole] = profile_passages(model, passages({"x": sequences})).values()
    total = [ExpertStatistics.zeros(32, 160) for _ in whole]
    for sequence in sequences:
        [part] = profile_passages(model, passages({"x": [sequence]})).values()
        for sum_, one in zip(total, part, strict=True):
            sum_.add(one)
    for mine, theirs in zip(whole, total, strict=True):
        assert_same(mine, theirs)
