"""A trace says what transformers does with the same tokens: routes, weights, and predictions with fewer experts."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from moe_surgery import Progress, load_model, plan_random, trace  # noqa: E402
from moe_surgery.errors import PlanMismatchError, UsageError  # noqa: E402
from moe_surgery.pipeline.planning import inspect  # noqa: E402
from moe_surgery.quality.routing_trace import ModelTrace, Trace  # noqa: E402
from moe_surgery.runtime.generate import generate  # noqa: E402
from moe_surgery.runtime.text import Text  # noqa: E402
from moe_surgery.selection.plan import Plan  # noqa: E402
from tests.support.routed import Routed, Seen  # noqa: E402

TINY = "example:tiny"
F32 = torch.float32
PROMPT = "12 + 30 = 42\ndef double(x):\n    return 2 * x\nThe parties agree that na\u00efve \u6f22 holds."
# Layers with different numbers of experts, one with fewer than the model's top-k.
UNEVEN = Plan("gpt_oss", 32, ((3, 1), tuple(range(32)), tuple(range(31, 15, -1)), (0, 7, 9, 30, 12)))
FEWER = Plan("gpt_oss", 32, (tuple(range(0, 32, 2)),) * 4, top_k=2)
PLANS = [("uneven.json", UNEVEN), ("fewer.json", FEWER)]


@pytest.fixture(scope="module")
def traced() -> Trace:
    return trace(TINY, PROMPT, plans=PLANS, dtype=F32)


@pytest.fixture(scope="module")
def seen(traced: Trace, routed: Routed) -> list[Seen]:
    """The same tokens through transformers: all experts, then only those of each plan."""
    results = [routed.see(traced.tokens)]
    for _, plan in PLANS:
        with routed.only(plan.layers, plan.top_k):
            results.append(routed.see(traced.tokens))
    return results


def by_expert(experts: list[int], weights: list[float]) -> dict[int, float]:
    return {e: w for e, w in zip(experts, weights, strict=True) if e >= 0}


def test_experts_and_weights_are_those_of_transformers(traced: Trace, seen: list[Seen]) -> None:
    assert [m.name for m in traced.models] == ["full", "uneven.json", "fewer.json"]
    for model, expected in zip(traced.models, seen, strict=True):
        assert model.experts.shape == (4, len(traced.tokens), model.experts.shape[2])
        for layer in range(4):
            for token in range(len(traced.tokens)):
                ours = by_expert(model.experts[layer, token].tolist(), model.weights[layer, token].tolist())
                theirs = by_expert(expected.routes[layer][token], expected.weights[layer][token])
                assert ours.keys() == theirs.keys(), (model.name, layer, token)
                assert ours == pytest.approx(theirs, abs=2e-5)
    assert [int((row[0] >= 0).sum()) for row in traced.models[1].experts] == [2, 4, 4, 4]
    assert traced.models[2].experts.shape[2] == 2


def test_the_largest_weight_comes_first_and_empty_slots_last(traced: Trace) -> None:
    for model in traced.models:
        assert (np.diff(model.weights, axis=2) <= 0).all()
        assert ((model.experts >= 0) == (model.weights > 0)).all()
        np.testing.assert_allclose(model.weights.sum(axis=2), 1, atol=1e-5)


def test_predictions_and_divergence_are_those_of_transformers(traced: Trace, seen: list[Seen]) -> None:
    def log_softmax(logits: np.ndarray) -> np.ndarray:
        high = logits.max(axis=1, keepdims=True)
        return logits - high - np.log(np.exp(logits - high).sum(axis=1, keepdims=True))

    full = log_softmax(seen[0].logits)
    following = np.array(traced.tokens[1:])
    for model, result in zip(traced.models, seen, strict=True):
        log_p = log_softmax(result.logits)
        kl = (np.exp(full) * (full - log_p)).sum(axis=1)
        np.testing.assert_allclose(model.kl, kl, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(
            model.loss, -log_p[np.arange(len(following)), following], rtol=1e-4, atol=1e-4
        )
        assert list(model.predicted) == log_p.argmax(axis=1).tolist()
        np.testing.assert_allclose(model.probability, np.exp(log_p.max(axis=1)), rtol=1e-3)
    assert traced.models[0].kl.max() == 0
    assert traced.models[1].kl.mean() > 0.01


def test_the_texts_of_tokens_are_the_text_with_special_tokens_written_out(traced: Trace) -> None:
    assert "".join(traced.texts) == PROMPT
    assert len(traced.texts) == len(traced.tokens) == traced.prompt_tokens
    text = Text(TINY)
    tokens = text.encode("<|start|>user<|message|>\u6f22\u6f22<|end|>")
    pieces = text.pieces(tokens)
    assert "".join(pieces) == "<|start|>user<|message|>\u6f22\u6f22<|end|>"
    assert (pieces[0], pieces[-1]) == ("<|start|>", "<|end|>")
    assert text.pieces([]) == []
    # A character cut off at the end is shown as far as it goes.
    assert "".join(text.pieces(text.encode("a\u6f22")[:-1])).startswith("a")


def test_what_the_model_generates_is_traced_after_the_chat_prompt() -> None:
    reports: list[Progress] = []
    traced = trace(TINY, chat="What is 7 + 5?", generate=6, dtype=F32, progress=reports.append)
    text = Text(TINY)
    prompt = text.encode(text.chat([{"role": "user", "content": "What is 7 + 5?"}]))
    answer = generate(
        load_model(TINY, dtype=F32), [prompt], max_new_tokens=6, stop_tokens=text.stop_tokens or None
    )
    assert list(traced.tokens) == prompt + answer.tokens[0]
    assert traced.prompt_tokens == len(prompt)
    # It was greedy: the traced model predicts what it generated.
    assert list(traced.models[0].predicted[len(prompt) - 1 : -1]) == answer.tokens[0]
    assert [(r.stage, r.unit) for r in reports[:1]] == [("generate", "tokens")]
    assert (reports[-1].stage, reports[-1].done) == ("trace", 4 * len(traced.tokens))


def test_the_json_form_holds_the_same_numbers(traced: Trace) -> None:
    root = json.loads(traced.to_json())
    assert (root["format"], root["version"]) == ("moe-surgery.trace", 1)
    assert (root["num_layers"], root["num_experts"], root["top_k"]) == (4, 32, 4)
    assert (tuple(root["tokens"]), tuple(root["texts"])) == (traced.tokens, traced.texts)
    assert root["settings"]["dtype"] == "float32"
    for model, stored in zip(traced.models, root["models"], strict=True):
        check_model(model, stored)


def check_model(model: ModelTrace, stored: dict) -> None:  # type: ignore[type-arg]
    assert [tuple(row) for row in stored["kept"]] == list(model.kept)
    for layer, (experts, weights) in enumerate(zip(stored["experts"], stored["weights"], strict=True)):
        slots = len(experts[0])
        assert experts == model.experts[layer, :, :slots].tolist()
        assert (model.experts[layer, :, slots:] == -1).all()
        np.testing.assert_allclose(weights, model.weights[layer, :, :slots], atol=1e-6)
    for name in ("loss", "kl", "probability"):
        np.testing.assert_allclose(stored[name], getattr(model, name), atol=1e-6)
    assert tuple(stored["predicted"]) == model.predicted
    assert tuple(stored["predicted_texts"]) == model.predicted_texts


def test_a_plan_of_all_experts_changes_nothing() -> None:
    every = plan_random(32, 0, inspect(TINY))
    traced = trace(TINY, "7 + 5 = 12", plans=[("every", every)], dtype=F32)
    full, same = traced.models
    assert (full.experts == same.experts).all()
    assert (full.weights == same.weights).all()
    assert (same.kl == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give one of `prompt` and `chat`"),
        ({"prompt": "a", "chat": "b"}, "give one of `prompt` and `chat`"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "a", "generate": 0}, "`generate` 0: must be at least 1"),
        ({"prompt": "1 + 1 = 2\n" * 20_000}, r"the prompt has \d+ tokens; this model supports 1 to \d+"),
    ],
)
def test_what_cannot_be_traced_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        trace(TINY, **arguments)  # type: ignore[arg-type]


def test_a_plan_of_another_model_is_refused() -> None:
    with pytest.raises(PlanMismatchError, match="3 layers"):
        trace(TINY, "a", plans=[("p", Plan("gpt_oss", 32, ((0,),) * 3))])


def test_one_token_has_no_next_token_to_predict() -> None:
    token = Text(TINY).encode("7")
    assert len(token) == 1
    traced = trace(TINY, "7", dtype=F32)
    assert traced.models[0].loss.shape == (0,)
    assert traced.models[0].kl.shape == (1,)
    assert json.loads(traced.to_json())["models"][0]["loss"] == []
