"""Statistics gathered layer by layer against hooks on transformers' model."""

from __future__ import annotations

import random
from collections import defaultdict

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from moe_surgery.quality import hidden_states as states  # noqa: E402
from moe_surgery.quality import layerwise  # noqa: E402
from moe_surgery.quality.corpus import Passage  # noqa: E402
from moe_surgery.quality.profile import part_domains, profile_passages  # noqa: E402
from moe_surgery.runtime.model import CausalLM  # noqa: E402
from moe_surgery.runtime.text import Text  # noqa: E402
from moe_surgery.selection.metrics import PROFILED_METRICS, score  # noqa: E402
from moe_surgery.selection.plan import Plan  # noqa: E402
from moe_surgery.selection.statistics import ExpertStatistics  # noqa: E402
from tests.support.routed import Routed, assert_same  # noqa: E402
from tests.support.sums import arithmetic  # noqa: E402

PROSE = "Experts that are never asked are left out of the file. " * 6


def passages(texts: dict[str, list[list[int]]]) -> list[Passage]:
    return [Passage(domain, tuple(s)) for domain, sequences in texts.items() for s in sequences]


def test_every_statistic_is_what_hooks_on_transformers_see(tiny_model: CausalLM, routed: Routed) -> None:
    text = Text("example:tiny")
    texts: dict[str, list[list[int]]] = defaultdict(list)
    texts["sums"] = [text.encode(arithmetic(random.Random(i), 300))[: 60 + 20 * i] for i in range(2)]
    texts["words"] = [text.encode(PROSE)]
    result = profile_passages(tiny_model, passages(texts))
    for domain, sequences in texts.items():
        expected = routed.statistics(sequences)
        assert all(layer.count.sum() == 4 * sum(map(len, sequences)) for layer in result[domain])
        assert_same(result[domain], expected)
        for metric in PROFILED_METRICS:
            for a, b in zip(score(metric, result[domain]), score(metric, expected), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5)


def test_sequences_together_are_sequences_apart(tiny_model: CausalLM) -> None:
    sequences = [[5, 80, 900, 33], [700, 8], [9, 10, 11, 12, 13, 14]]
    [whole] = profile_passages(tiny_model, passages({"x": sequences})).values()
    total = [ExpertStatistics.zeros(32, 160) for _ in whole]
    for sequence in sequences:
        [part] = profile_passages(tiny_model, passages({"x": [sequence]})).values()
        for sum_, one in zip(total, part, strict=True):
            sum_.add(one)
    assert_same(whole, total)


def test_prompt_and_answer_are_counted_apart(tiny_model: CausalLM, routed: Routed) -> None:
    tokens = Text("example:tiny").encode(arithmetic(random.Random(4), 200))[:50]
    conversation = Passage("law", tuple(tokens), answer=20)
    result = profile_passages(tiny_model, [conversation, Passage("law", tuple(tokens))])
    prompt, answer = part_domains("law")
    assert sorted(result) == sorted(["law", prompt, answer])
    # Attention looks back only: the prompt's statistics are those of the prompt by itself.
    assert_same(result[prompt], routed.statistics([tokens[:20]]))
    both = [ExpertStatistics.zeros(32, 160) for _ in range(4)]
    for total, one, other in zip(both, result[prompt], result[answer], strict=True):
        total.add(one)
        total.add(other)
    assert_same(both, result["law"])
    assert_same(both, routed.statistics([tokens]))


@pytest.mark.parametrize("answer", [0, 7, 30])
def test_an_answer_may_be_all_or_nothing_of_a_piece(tiny_model: CausalLM, answer: int) -> None:
    result = profile_passages(tiny_model, [Passage("law", (5, 80, 900, 33, 2, 7, 8), answer)])
    assert list(result) == (["law:answer"] if answer == 0 else ["law:prompt"])


@pytest.mark.parametrize("top_k", [None, 2])
def test_sequential_layers_see_what_the_plan_leaves_of_earlier_ones(
    tiny_model: CausalLM, routed: Routed, top_k: int | None
) -> None:
    tokens = Text("example:tiny").encode(PROSE)[:60]
    rng = np.random.default_rng(1)
    kept = tuple(tuple(int(e) for e in rng.permutation(32)[:n]) for n in (6, 3, 9, 5))
    plan = Plan("gpt_oss", 32, kept, top_k)
    [result] = profile_passages(tiny_model, [Passage("x", tuple(tokens))], sequential=plan).values()
    assert_same(result, routed.sequential([tokens], kept, top_k), rtol=2e-5)
    [plain] = profile_passages(tiny_model, [Passage("x", tuple(tokens))]).values()
    assert_same(result[:1], plain[:1])
    assert any((a.count != b.count).any() for a, b in zip(result, plain, strict=True))


def test_many_tokens_in_pieces_and_spilled_to_a_file_are_the_same(
    tiny_model: CausalLM, routed: Routed, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Text("example:tiny")
    sequences = [text.encode(arithmetic(random.Random(i), 500))[: 150 + i] for i in range(2)]
    [whole] = profile_passages(tiny_model, passages({"x": sequences})).values()
    monkeypatch.setattr(states, "IN_MEMORY_BYTES", 1000)
    monkeypatch.setattr(states, "CHUNK_TOKENS", 37)
    monkeypatch.setattr(layerwise, "SCORE_BYTES", 150 * 4 * 8 * 4)  # a few queries at a time
    [pieces] = profile_passages(tiny_model, passages({"x": sequences})).values()
    assert_same(pieces, whole)
    assert_same(pieces, routed.statistics(sequences))
