"""What plans and pruned checkpoints cost, against transformers with masked routers in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from moe_surgery.checkpoint.resolve import resolve  # noqa: E402
from moe_surgery.errors import InvalidInputError, PlanMismatchError, UsageError  # noqa: E402
from moe_surgery.progress import Progress  # noqa: E402
from moe_surgery.quality import evaluate as module  # noqa: E402
from moe_surgery.quality.candidates import Candidate  # noqa: E402
from moe_surgery.quality.corpus import Corpus, Passage, open_corpus, text_files  # noqa: E402
from moe_surgery.quality.evaluate import evaluate, evaluate_passages  # noqa: E402
from moe_surgery.quality.evaluation import Evaluation, Quality  # noqa: E402
from moe_surgery.runtime.model import CausalLM  # noqa: E402
from moe_surgery.runtime.text import Text  # noqa: E402
from moe_surgery.selection.plan import Plan  # noqa: E402
from tests.quality.plans import F32, PLANS, TINY  # noqa: E402
from tests.runtime.models import write_lively  # noqa: E402
from tests.support.checkpoints import Shape, Tensors, write_checkpoint  # noqa: E402
from tests.support.routed import Routed, Seen  # noqa: E402


def opened(text: Text, *paths: Path, context: int = 4096) -> Corpus:
    return open_corpus(text_files(paths), text, context=context)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def expected(
    passages: Sequence[Passage], full: Sequence[Seen], cut: Sequence[Seen], answers_only: bool = False
) -> dict[str, Quality]:
    """From the definitions, token by token."""
    rows: dict[str, list[tuple[float, float, bool]]] = {}
    routes: dict[str, list[list[bool]]] = {}
    for passage, a, b in zip(passages, full, cut, strict=True):
        p, q = log_softmax(a.logits), log_softmax(b.logits)
        output = rows.setdefault(passage.domain, [])
        moved = routes.setdefault(passage.domain, [[] for _ in a.routes])
        for t in range(len(passage.tokens)):
            following = t + 1 < len(passage.tokens)
            counts = following and (
                not answers_only or (passage.answer is not None and t + 1 >= passage.answer)
            )
            if counts:
                kl = float((np.exp(p[t]) * (p[t] - q[t])).sum())
                output.append((-q[t, passage.tokens[t + 1]], kl, p[t].argmax() == q[t].argmax()))
            if counts or not answers_only:
                for layer, (first, second) in enumerate(zip(a.routes, b.routes, strict=True)):
                    moved[layer] += [e not in first[t] for e in second[t][: len(first[t])]]
    result = {}
    for domain, values in rows.items():
        if values:
            loss, kl, same = (float(np.mean(column)) for column in zip(*values, strict=True))
            result[domain] = Quality(
                len(values), loss, kl, same, tuple(map(float, map(np.mean, routes[domain])))
            )
    return result


def assert_close(actual: Quality, reference: Quality) -> None:
    assert actual.tokens == reference.tokens
    assert actual.cross_entropy == pytest.approx(reference.cross_entropy, rel=1e-4)
    assert actual.perplexity == pytest.approx(math.exp(reference.cross_entropy), rel=1e-3)
    assert actual.kl == pytest.approx(reference.kl, rel=1e-3, abs=1e-5)
    assert actual.agreement == pytest.approx(reference.agreement, abs=1e-12)
    assert actual.rerouted == pytest.approx(reference.rerouted, abs=1e-12)


@pytest.fixture(scope="module")
def found(text: Text, paths: list[Path]) -> Evaluation:
    return evaluate(TINY, paths, plans=list(PLANS.items()), dtype=F32)


@pytest.fixture(scope="module")
def full(text: Text, paths: list[Path], routed: Routed) -> list[Seen]:
    return [routed.see(p.tokens) for p in opened(text, *paths)]


def seen(routed: Routed, plan: Plan, passages: Sequence[Passage]) -> list[Seen]:
    with routed.only(plan.layers, plan.top_k):
        return [routed.see(p.tokens) for p in passages]


# --- views against masked routers


@pytest.mark.parametrize("name", PLANS)
def test_a_plans_figures_are_those_of_masked_routers(
    name: str, found: Evaluation, full: list[Seen], routed: Routed, text: Text, paths: list[Path]
) -> None:
    passages, plan = list(opened(text, *paths)), PLANS[name]
    actual = found.models[1 + list(PLANS).index(name)]
    assert (actual.name, actual.kind) == (name, "plan")
    assert actual.experts == tuple(map(len, plan.layers))
    assert actual.top_k == max(min(plan.top_k or 4, len(row)) for row in plan.layers)
    reference = expected(passages, full, seen(routed, plan, passages))
    assert actual.domains.keys() == reference.keys() == {"sums", "words", "talk"}
    for domain, quality in reference.items():
        assert_close(actual.domains[domain], quality)
    everything = [replace(p, domain="x") for p in passages]
    overall = expected(everything, full, seen(routed, plan, passages))["x"]
    assert_close(replace(actual.overall, rerouted=()), replace(overall, rerouted=()))


def test_the_full_model_is_its_own_measure(
    found: Evaluation, full: list[Seen], text: Text, paths: list[Path]
) -> None:
    reference = expected(list(opened(text, *paths)), full, full)
    first = found.models[0]
    assert (first.name, first.kind, first.experts, first.top_k) == ("full", "full", (32,) * 4, 4)
    for domain, quality in first.domains.items():
        assert_close(quality, reference[domain])
        assert (quality.kl, quality.agreement, quality.rerouted) == (0, 1, (0,) * 4)


def test_shares_are_shares(found: Evaluation) -> None:
    for model in found.models:
        for quality in model.domains.values():
            assert quality.kl >= 0
            assert 0 <= quality.agreement <= 1
            assert all(0 <= share <= 1 for share in quality.rerouted)
    # A plan of six slots chooses as the model does where the first four are kept.
    assert max(found.models[5].domains["sums"].rerouted) == 0


@pytest.mark.parametrize("name", ["eight", "different counts"])
def test_on_answers_only_answers_count(
    name: str, routed: Routed, full: list[Seen], text: Text, paths: list[Path]
) -> None:
    passages, plan = list(opened(text, *paths)), PLANS[name]
    evaluation = evaluate(TINY, paths, plans=[(name, plan)], answers_only=True, dtype=F32)
    reference = expected(passages, full, seen(routed, plan, passages), answers_only=True)
    assert evaluation.domains == ["talk"] == list(reference)
    assert_close(evaluation.models[1].domains["talk"], reference["talk"])
    assert evaluation.settings["answers_only"] is True


@pytest.mark.parametrize("context", [9, 40])
def test_split_texts_are_texts_of_their_own(context: int, routed: Routed, text: Text, texts: Path) -> None:
    for answers_only in (False, True):
        corpus = opened(text, texts / "talk.jsonl", context=context)
        evaluation = evaluate(
            TINY,
            texts / "talk.jsonl",
            context=context,
            plans=[("x", PLANS["eight"])],
            answers_only=answers_only,
            dtype=F32,
        )
        passages = list(corpus)
        whole = [routed.see(p.tokens) for p in passages]
        reference = expected(passages, whole, seen(routed, PLANS["eight"], passages), answers_only)
        assert_close(evaluation.models[1].domains["talk"], reference["talk"])


@pytest.mark.parametrize("batch_tokens", [30])
def test_batches_and_pieces_of_any_size_give_the_same_figures(
    batch_tokens: int, found: Evaluation, text: Text, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOGIT_BYTES", 2048 * 4 * 7)
    done: list[Progress] = []
    again = evaluate(
        TINY,
        paths,
        plans=list(PLANS.items()),
        dtype=F32,
        batch_tokens=batch_tokens,
        progress=done.append,
    )
    for actual, reference in zip(again.models, found.models, strict=True):
        for domain, quality in reference.domains.items():
            assert_close(actual.domains[domain], quality)
    output = sum(int(str(t["tokens"])) for listed in again.texts.values() for t in listed)
    assert {(p.stage, p.total, p.unit) for p in done} == {("evaluate", output, "tokens")}
    assert [p.done for p in done] == sorted(p.done for p in done)
    assert done[-1].done == output == sum(len(p.tokens) for p in opened(text, *paths))


def test_provenance_texts_and_checkpoint_are_recorded(text: Text, texts: Path) -> None:
    plan = replace(PLANS["eight"], provenance={"method": "reap", "domains": ["law"]})
    evaluation = evaluate(TINY, texts / "words.jsonl", plans=[("p.json", plan)], dtype=F32)
    assert evaluation.models[1].provenance == plan.provenance
    assert evaluation.models[0].provenance == {}
    assert evaluation.texts["words"][0]["name"] == "words.jsonl"
    assert (evaluation.checkpoint, evaluation.num_experts) == (TINY, 32)
    assert evaluation.settings["dtype"] == "float32"


# --- what is refused


def test_plans_and_checkpoints_of_other_models_are_refused(tmp_path: Path, text: Text, texts: Path) -> None:
    corpus = texts / "words.jsonl"
    with pytest.raises(PlanMismatchError, match="the plan is for gpt_oss with 4 layers of 8 experts"):
        evaluate(TINY, corpus, plans=[("x", Plan("gpt_oss", 8, ((0,),) * 4))])
    other = write_checkpoint(tmp_path / "other", Shape(layers=2))
    with pytest.raises(PlanMismatchError, match=r"other: has 2 layers, hidden size 64, vocabulary 24"):
        evaluate(TINY, corpus, pruned=[other])


def test_texts_with_nothing_to_predict_are_refused(tmp_path: Path, text: Text, texts: Path) -> None:
    (tmp_path / "x.txt").write_text("One and two.")
    with pytest.raises(UsageError, match="no token to predict; give longer ones"):
        evaluate(TINY, tmp_path / "x.txt", context=1, plans=[("x", PLANS["eight"])])
    for name in ("words.jsonl", "asked.jsonl"):
        with pytest.raises(UsageError, match=r"no token to predict in an answer .*`answers_only`"):
            evaluate(TINY, texts / name, plans=[("x", PLANS["eight"])], answers_only=True)
    with pytest.raises(UsageError, match="`batch_tokens` 0: must be at least 1"):
        evaluate(TINY, tmp_path / "x.txt", plans=[("x", PLANS["eight"])], batch_tokens=0)


def test_a_domain_with_nothing_to_predict_is_left_out(tiny_model: CausalLM) -> None:
    passages = [Passage("one", (5,)), Passage("two", (5, 6, 7))]
    models = evaluate_passages(
        tiny_model, [passages[:1], passages[1:]], [Candidate("x", PLANS["all"].layers)]
    )
    assert [list(m.domains) for m in models] == [["two"], ["two"]]
    assert models[1].domains["two"].tokens == 2


def test_predictions_that_are_not_numbers_are_refused(tmp_path: Path, texts: Path) -> None:
    def overflowing(tensors: Tensors) -> None:
        tensors["model.layers.1.mlp.experts.down_proj_bias"][0] = 0x7F00  # BF16 1.7e38: infinite in F16

    shape = Shape(layers=3, experts=3, top_k=1, vocabulary=2048)
    folder = write_lively(tmp_path / "model", shape, edit_tensors=overflowing)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((resolve(TINY) / name).read_bytes())
    corpus = texts / "words.jsonl"
    plan = Plan("gpt_oss", 3, ((0,),) * 3)
    with pytest.raises(InvalidInputError, match="predictions on domain 'words' are not finite"):
        evaluate(folder, corpus, plans=[("x", plan)], dtype=torch.float16)
    assert evaluate(folder, corpus, plans=[("x", plan)], dtype=torch.bfloat16).to_json()
