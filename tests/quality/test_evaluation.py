"""Evaluations as files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_surgery.errors import InvalidInputError, OutputError
from moe_surgery.quality.evaluation import Evaluation, ModelResult, Quality, load_evaluation

shares = st.floats(0, 1)
numbers = st.floats(0, 1e6)
names = st.text(min_size=1, max_size=5).filter(lambda s: s.isprintable())


def qualities(layers: int) -> st.SearchStrategy[Quality]:
    return st.builds(Quality, st.integers(1, 10**9), numbers, numbers, shares, st.tuples(*[shares] * layers))


@st.composite
def evaluations(draw: st.DrawFn) -> Evaluation:
    layers = draw(st.integers(1, 3))
    domains = draw(st.lists(names, min_size=1, max_size=3, unique=True))

    def model(kind: str) -> ModelResult:
        result = {d: draw(qualities(layers)) for d in domains}
        experts = tuple(draw(st.integers(1, 128)) for _ in range(layers))
        return ModelResult(draw(names), kind, experts, draw(st.integers(1, 8)), result, {"seed": 1})

    kinds = ["full", *draw(st.lists(st.sampled_from(["plan", "checkpoint"]), max_size=3))]
    texts = {d: [{"name": d, "tokens": 3}] for d in domains}
    models = tuple(map(model, kinds))
    return Evaluation("gpt_oss", draw(names), "abc", 32, models, texts, {"context": 4096})


@given(evaluations())
@settings(max_examples=15)
def test_an_evaluation_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, before: Evaluation
) -> None:
    file = tmp_path_factory.getbasetemp() / "evaluation.json"
    file.write_text(before.to_json())
    after = load_evaluation(file)
    assert after == before
    assert after.as_dict() == before.as_dict()


def example() -> Evaluation:
    one = Quality(30, 2.0, 0.0, 1.0, (0.0, 0.0))
    other = Quality(10, 3.0, 0.0, 1.0, (0.0, 0.0))
    cut = {"a": Quality(30, 2.5, 0.5, 0.9, (0.1, 0.2)), "b": Quality(10, 800.0, 1.5, 0.5, (0.5, 0.6))}
    models = (
        ModelResult("full", "full", (4, 4), 2, {"a": one, "b": other}),
        ModelResult("x.json", "plan", (2, 1), 2, cut, {"method": "reap"}),
    )
    return Evaluation("gpt_oss", "example:tiny", "abc", 4, models, {"a": [], "b": []}, {})


def test_all_domains_together_weigh_by_their_tokens() -> None:
    overall = example().models[1].overall
    assert overall.tokens == 40
    assert overall.cross_entropy == pytest.approx((30 * 2.5 + 10 * 800) / 40)
    assert overall.kl == pytest.approx(0.75)
    assert overall.agreement == pytest.approx(0.8)
    assert overall.rerouted == pytest.approx((0.2, 0.3))
    assert example().models[1].mean_experts == 1.5
    assert example().domains == ["a", "b"]


def test_perplexity_past_double_range_is_infinite_and_null_in_the_file() -> None:
    assert example().models[1].domains["a"].perplexity == pytest.approx(math.exp(2.5))
    assert example().models[1].domains["b"].perplexity == math.inf
    output = json.loads(example().to_json())["models"][1]["domains"]
    assert output["b"]["perplexity"] is None
    assert output["a"]["perplexity"] == pytest.approx(math.exp(2.5))


def damaged(value: object) -> Iterator[object]:
    """`value` with one part left out or replaced, for every part of it."""
    odd: list[object] = [None, "x", -1, [], {}, True, 10**400, [None]]
    if isinstance(value, dict):
        for key, part in value.items():
            yield {k: v for k, v in value.items() if k != key}
            yield from ({**value, key: other} for other in [*odd, *damaged(part)])
    elif isinstance(value, list):
        for folder, part in enumerate(value):
            yield value[:folder] + value[folder + 1 :]
            yield from ([*value[:folder], other, *value[folder + 1 :]] for other in [*odd, *damaged(part)])


def test_a_damaged_file_is_refused_or_makes_sense(tmp_path: Path) -> None:
    file = tmp_path / "e.json"
    refused = []
    for root in damaged(json.loads(example().to_json())):
        file.write_text(json.dumps(root))
        try:
            result = load_evaluation(file)
        except InvalidInputError as error:
            refused.append(str(error))
            continue
        assert json.loads(result.to_json())
        assert result.domains
        assert all(m.mean_experts > 0 and m.overall.perplexity > 0 for m in result.models)
        assert all(isinstance(text, dict) for listed in result.texts.values() for text in listed)
    assert len(refused) > 100
    assert all(line.startswith(f"{file}: ") and line.isprintable() for line in refused)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "not valid JSON"),
        ("[]", "not an evaluation"),
        ('{"format": "moe-surgery.plan"}', "not an evaluation"),
        ('{"format": "moe-surgery.evaluation", "version": 2}', "version 2 is unknown"),
        ('{"format": "moe-surgery.evaluation", "version": true}', "version true is unknown"),
        ('{"format": "moe-surgery.evaluation", "version": 1}', "incomplete evaluation"),
    ],
)
def test_other_files_are_refused(content: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(content)
    with pytest.raises(InvalidInputError, match=rf"e\.json: .*{complaint}"):
        load_evaluation(tmp_path / "e.json")


def test_a_missing_file_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"e\.json: cannot open"):
        load_evaluation(tmp_path / "e.json")
