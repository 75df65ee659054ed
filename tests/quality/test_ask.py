"""Questions put to the full model and to plans, against transformers with masked routers."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from moe_surgery import prune  # noqa: E402
from moe_surgery.errors import InvalidInputError, UsageError  # noqa: E402
from moe_surgery.examples.skills import draw_questions  # noqa: E402
from moe_surgery.progress import Progress  # noqa: E402
from moe_surgery.quality.candidates import Candidate  # noqa: E402
from moe_surgery.quality.corpus import Passage  # noqa: E402
from moe_surgery.quality.evaluate import evaluate  # noqa: E402
from moe_surgery.quality.evaluation import Evaluation, load_evaluation  # noqa: E402
from moe_surgery.quality.likelihood import log_likelihoods  # noqa: E402
from moe_surgery.quality.own_layers import as_layers  # noqa: E402
from moe_surgery.quality.replies import ReplyFile  # noqa: E402
from moe_surgery.runtime.generate import generate  # noqa: E402
from moe_surgery.runtime.model import CausalLM  # noqa: E402
from moe_surgery.runtime.text import Text  # noqa: E402
from moe_surgery.runtime.view import view  # noqa: E402
from moe_surgery.selection.plan import Plan  # noqa: E402
from tests.quality.conftest import write_lines  # noqa: E402
from tests.quality.plans import F32, PLANS, TINY  # noqa: E402
from tests.support.routed import Routed  # noqa: E402

PLAN = PLANS["top-6 of twenty"]
NEW = 10
CHOICES = ("four", "five", "seventeen", "no")


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten questions of three kinds, prompts and conversations, in two domains."""
    drawn = draw_questions("arithmetic", 6, 3, held_out=True)
    rows: list[object] = [{"prompt": q.prompt, "answer": q.answer, "domain": "sums"} for q in drawn[:3]]
    rows += [{"prompt": q.prompt, "answer": int(q.answer), "domain": "sums", "id": q.text} for q in drawn[3:]]
    rows += [
        {"prompt": f"Question: How do you write {n} in words?\nAnswer:", "choices": CHOICES, "answer": n - 4}
        for n in (4, 5)
    ]
    user = [{"role": "user", "content": "Which comes after three?"}]
    rows += [
        {"messages": user, "choices": CHOICES, "answer": "four"},
        {"messages": user, "answer": "[a-z]", "kind": "regex"},
    ]
    return write_lines(tmp_path_factory.mktemp("asked") / "words.jsonl", rows)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "eight"
    prune(TINY, out, PLANS["eight"])
    return out


def run(asked: Path, **options: object) -> Evaluation:
    return evaluate(TINY, answers=asked, max_new_tokens=NEW, dtype=F32, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept") / "replies.jsonl"


@pytest.fixture(scope="module")
def found(asked: Path, pruned: Path, kept: Path) -> Evaluation:
    return run(asked, plans=[("twenty", PLAN)], pruned=[pruned], replies=kept)


def entries(kept: Path, model: str) -> dict[int, dict[str, object]]:
    rows = [json.loads(line) for line in kept.read_text().splitlines()[1:]]
    return {row["question"]: row for row in rows if row["model"] == model}


def likelihood(routed: Routed, plan: Plan | None, tokens: tuple[int, ...], start: int) -> tuple[float, bool]:
    """From transformers' logits of the whole sequence."""
    if plan is None:
        logits = routed.see(tokens).logits
    else:
        with routed.only(plan.layers, plan.top_k):
            logits = routed.see(tokens).logits
    log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_p -= logits.max(-1, keepdims=True)
    at = range(start, len(tokens))
    return sum(log_p[t - 1, tokens[t]] for t in at), all(log_p[t - 1].argmax() == tokens[t] for t in at)


def test_likelihoods_are_those_of_masked_routers(tiny_model: CausalLM, routed: Routed, text: Text) -> None:
    whole = text.encode("Question: What is 2 + 3?\nAnswer: 5\nQuestion: What is 4 + 4?\nAnswer: 8")
    passages = [Passage("", tuple(whole), start) for start in (1, len(whole) - 1)]
    passages += [Passage("", (*whole[:12], last), 10) for last in (5, whole[12], 700)]
    passages.append(Passage("", tuple(whole[:5]), 5))  # nothing to predict
    candidates = [
        Candidate("full", None, model=as_layers(tiny_model)),
        Candidate("view", PLAN.layers, PLAN.top_k),
    ]
    expected = [
        [likelihood(routed, plan, p.tokens, p.answer or 0) for p in passages] for plan in (None, PLAN)
    ]
    for batch_tokens in (1, 30, 8192):
        finished: list[int] = []
        scored = log_likelihoods(
            tiny_model, candidates, passages, batch_tokens=batch_tokens, progress=finished.append
        )
        assert sum(finished) == len(passages) - 1
        for ours, theirs in zip(scored, expected, strict=True):
            values = [found.log_probability for found in ours]
            assert values == pytest.approx([value for value, _ in theirs], rel=1e-4, abs=1e-4)
            assert [found.greedy for found in ours] == [greedy for _, greedy in theirs]


@pytest.mark.parametrize(("name", "plan"), [("full", None), ("twenty", PLAN)])
def test_choices_are_scored_as_continuations(
    name: str, plan: Plan | None, found: Evaluation, kept: Path, asked: Path, routed: Routed, text: Text
) -> None:
    rows = [json.loads(line) for line in asked.read_text().splitlines()]
    for number, entry in entries(kept, name).items():
        row = rows[number]
        if "choices" not in row:
            continue
        expected = []
        for choice in CHOICES:
            if "prompt" in row:
                before, after = row["prompt"], f"{row['prompt']} {choice}"
            else:
                before = text.chat(row["messages"])
                after = text.chat([*row["messages"], {"role": "assistant", "content": choice}], prompt=False)
            start, tokens = len(text.encode(before)), tuple(text.encode(after))
            expected.append(likelihood(routed, plan, tokens, start)[0])
        assert entry["scores"] == pytest.approx(expected, rel=1e-4, abs=1e-4)
        chosen = CHOICES[int(np.argmax(expected))]
        assert entry["reply"] == chosen
        assert entry["right"] == (
            chosen in (row["answer"], CHOICES[row["answer"]] if row["answer"] != "four" else "")
        )


def test_replies_are_the_greedy_continuations_of_each_model(
    found: Evaluation, kept: Path, asked: Path, tiny_model: CausalLM, text: Text
) -> None:
    rows = [json.loads(line) for line in asked.read_text().splitlines()]
    models = {"full": tiny_model, "twenty": view(tiny_model, PLAN)}
    for name, model in models.items():
        for number, entry in entries(kept, name).items():
            row = rows[number]
            if "choices" in row:
                continue
            prompt = text.encode(row["prompt"] if "prompt" in row else text.chat(row["messages"]))
            (tokens,) = generate(model, [prompt], max_new_tokens=NEW).tokens
            reply = text.decode(tokens)
            if "prompt" in row:
                reply = reply.split("\n")[0]
            assert entry["reply"] == reply.strip()
            shown = entry["tokens"]
            assert isinstance(shown, list)
            assert shown == tokens[: len(shown)]
            if row.get("kind") != "regex":
                assert entry["right"] == (reply.strip() == str(row["answer"]))


def test_accuracy_pairs_every_model_with_the_full_one(
    found: Evaluation, kept: Path, asked: Path, pruned: Path
) -> None:
    assert [m.name for m in found.models] == ["full", "twenty", str(pruned)]
    full = entries(kept, "full")
    for model in found.models:
        given = entries(kept, model.name)
        assert len(given) == 10
        assert set(model.accuracy) == {"sums", "words"}
        assert [model.accuracy[d].questions for d in ("sums", "words")] == [6, 4]
        assert model.overall_accuracy.right == sum(bool(e["right"]) for e in given.values())
        lost = {e["id"] for n, e in given.items() if full[n]["right"] and not e["right"]}
        gained = {e["id"] for n, e in given.items() if e["right"] and not full[n]["right"]}
        assert (set(model.overall_accuracy.lost), set(model.overall_accuracy.gained)) == (lost, gained)
    assert found.models[0].accuracy["sums"].right >= 5  # what it was trained for
    assert not found.models[0].overall_accuracy.lost
    assert found.models[2].overall_accuracy.lost
    (sums,) = found.questions["sums"]
    assert (sums["name"], sums["questions"]) == ("words.jsonl", 6)


def test_without_texts_models_are_compared_on_the_full_models_replies(
    found: Evaluation, kept: Path, asked: Path, routed: Routed, text: Text
) -> None:
    rows = [json.loads(line) for line in asked.read_text().splitlines()]
    kl: dict[str, list[float]] = {"sums": [], "words": []}
    for number, entry in entries(kept, "full").items():
        row = rows[number]
        prompt = row.get("prompt") or text.chat(row["messages"])
        tokens = text.encode(prompt)
        start = len(tokens)
        if "choices" in row:
            right = row["answer"] if isinstance(row["answer"], str) else CHOICES[row["answer"]]
            after = f"{prompt} {right}"
            if "messages" in row:
                after = text.chat([*row["messages"], {"role": "assistant", "content": right}], prompt=False)
            tokens = text.encode(after)
        else:
            reply = entry["tokens"]
            assert isinstance(reply, list)
            tokens = [*tokens, *reply]
        full = torch.log_softmax(torch.tensor(routed.see(tokens).logits), -1)
        with routed.only(PLAN.layers, PLAN.top_k):
            cut = torch.log_softmax(torch.tensor(routed.see(tokens).logits), -1)
        per_token = (full.exp() * (full - cut)).sum(-1)[start - 1 : len(tokens) - 1]
        kl[row.get("domain", "words")] += per_token.tolist()
    for domain, values in kl.items():
        quality = found.models[1].domains[domain]
        assert quality.tokens == len(values)
        assert quality.kl == pytest.approx(np.mean(values), rel=1e-3, abs=1e-5)


def test_with_texts_the_figures_are_of_the_texts(
    asked: Path, paths: list[Path], found: Evaluation, kept: Path, tmp_path: Path
) -> None:
    replies = tmp_path / "replies.jsonl"
    replies.write_text(kept.read_text())
    options = {"texts": paths[:1], "plans": [("twenty", PLAN)], "max_tokens": 100}
    both = run(asked, replies=replies, **options)
    alone = evaluate(TINY, dtype=F32, **options)
    assert [m.domains for m in both.models] == [m.domains for m in alone.models]
    assert [m.accuracy for m in both.models] == [m.accuracy for m in found.models[:2]]
    assert "questions" not in alone.as_dict()


def test_an_evaluation_with_answers_comes_back_as_it_was(found: Evaluation, tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(found.to_json())
    assert load_evaluation(tmp_path / "e.json") == found


class Stop(Exception):
    pass


def test_an_interrupted_run_continues_where_it_stopped(
    asked: Path, found: Evaluation, tmp_path: Path
) -> None:
    replies = tmp_path / "replies.jsonl"

    def stop_at(count: int):
        def progress(progress: Progress) -> None:
            if progress.stage == "answer" and progress.done >= count:
                raise Stop

        return progress

    models = {"plans": [("twenty", PLAN)]}
    for count in (4, 13):
        with pytest.raises(Stop):
            run(asked, **models, replies=replies, progress=stop_at(count), batch_tokens=100)
        with replies.open("a") as file:
            file.write('{"model": "twe')  # as a kill may leave it
    before = [line for line in replies.read_text().splitlines(keepends=True) if line.endswith("\n")]
    seen: list[Progress] = []
    again = run(asked, **models, replies=replies, progress=seen.append, batch_tokens=100)
    assert [m.accuracy for m in again.models] == [m.accuracy for m in found.models[:2]]
    after = replies.read_text().splitlines(keepends=True)
    assert after[: len(before)] == before
    assert len(after) == 1 + 2 * 10  # nothing was asked twice
    assert [p.done for p in seen if p.stage == "answer"][-1] == 20


def test_another_plan_costs_only_its_own_replies(
    asked: Path, found: Evaluation, kept: Path, tmp_path: Path
) -> None:
    replies = tmp_path / "replies.jsonl"
    replies.write_text(kept.read_text())
    more = run(asked, plans=[("renamed", PLAN), ("all", PLANS["all"])], replies=replies)
    assert replies.read_text().startswith(kept.read_text())
    assert len(entries(replies, "all")) == 10
    assert not entries(replies, "renamed")
    assert not more.models[2].overall_accuracy.lost  # all experts, in another order
    assert more.models[1].accuracy == found.models[1].accuracy


def test_checkpoints_that_differ_outside_their_routers_are_two_models(
    asked: Path, pruned: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(pruned, other)
    replies = tmp_path / "replies.jsonl"
    run(asked, pruned=[pruned, other], replies=replies)
    assert len(entries(replies, str(pruned))) == len(entries(replies, str(other))) == 10


def test_replies_of_another_job_are_not_used(
    asked: Path, kept: Path, found: Evaluation, tmp_path: Path
) -> None:
    replies = tmp_path / "replies.jsonl"
    replies.write_text(kept.read_text())
    evaluate(TINY, answers=asked, max_new_tokens=NEW - 1, dtype=F32, replies=replies, top_k=4)
    assert {json.loads(line)["model"] for line in replies.read_text().splitlines()[1:]} == {"full", "top-k 4"}


def test_damaged_replies_are_named(tmp_path: Path) -> None:
    file = tmp_path / "replies.jsonl"
    for damage in ("[]\n", '{"key": "full", "question": 0}\n', '{"key": "full", "question": 99}\n'):
        file.write_text('{"job": "x"}\n' + damage)
        with pytest.raises(InvalidInputError, match="line 2 is damaged; delete the file"):
            ReplyFile(file, "x").read([])


def test_replies_cut_off_are_reported(asked: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="moe_surgery"):
        evaluate(TINY, answers=asked, max_new_tokens=1, dtype=F32, top_k=4)
    assert "full: 7 of 10 replies were cut off at 1 tokens" in caplog.text


def test_what_cannot_be_asked_is_refused_before_any_work(asked: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pass `texts` or `answers`"):
        evaluate(TINY, plans=[("twenty", PLAN)])
    with pytest.raises(
        UsageError, match=r"line 1: takes .* tokens with `max_new_tokens` 10; the context is 16"
    ):
        evaluate(TINY, answers=asked, max_new_tokens=10, context=16, top_k=2)
    with pytest.raises(UsageError, match="`max_new_tokens` 0"):
        evaluate(TINY, answers=asked, max_new_tokens=0, top_k=2)
    bad = write_lines(
        tmp_path / "bad.jsonl", [{"messages": [{"role": "judge", "content": "x"}], "answer": "y"}]
    )
    with pytest.raises(InvalidInputError, match=r"bad.jsonl: line 1: .*unknown role"):
        evaluate(TINY, answers=bad, top_k=2)
