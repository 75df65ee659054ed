"""Profiling with generated answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from moe_surgery.checkpoint.resolve import resolve  # noqa: E402
from moe_surgery.errors import InvalidInputError, UsageError  # noqa: E402
from moe_surgery.quality.corpus import text_files  # noqa: E402
from moe_surgery.quality.job import ProfileResult, profile  # noqa: E402
from moe_surgery.runtime.load import load_model  # noqa: E402
from moe_surgery.runtime.text import Text  # noqa: E402
from tests.quality.conftest import QUESTIONS, conversation, write_lines  # noqa: E402
from tests.quality.jobs import F32, TINY, Recorder, run  # noqa: E402
from tests.support.routed import Routed, assert_same  # noqa: E402


@pytest.fixture(scope="module")
def answered(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> ProfileResult:
    return run(tmp_path_factory.mktemp("own") / "own.stats", texts / "asked.jsonl", generate=6)


def lines_of(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out.parent / f"{out.name}.answers.jsonl").read_text().splitlines()]


def greedy(routed: Routed, prompt: list[int], most: int) -> list[int]:
    """What transformers says, token by token, until a stop token of generation_config.json."""
    stops = json.loads((resolve(TINY) / "generation_config.json").read_text())["eos_token_id"]
    tokens = list(prompt)
    while len(tokens) < len(prompt) + most:
        tokens.append(int(routed.see(tokens).logits[-1].argmax()))
        if tokens[-1] in stops:
            break
    return tokens


def test_answers_are_the_models_own_greedy_ones(
    answered: ProfileResult, texts: Path, text: Text, routed: Routed
) -> None:
    printed = lines_of(answered.output)[1:]
    assert len(printed) == len(QUESTIONS)
    for question, result in zip(QUESTIONS, printed, strict=True):
        prompt = text.encode(text.chat([{"role": "user", "content": question}]))
        assert result == {"domain": "asked", "tokens": greedy(routed, prompt, 6), "answer": len(prompt)}


def test_prompts_and_their_answers_are_counted_apart_and_add_up(
    answered: ProfileResult, routed: Routed
) -> None:
    results, printed = answered.statistics, lines_of(answered.output)[1:]
    tokens = [list(result["tokens"]) for result in printed]  # type: ignore[call-overload]
    starts = [int(str(result["answer"])) for result in printed]
    assert results.tokens == {
        "asked:prompt": sum(starts),
        "asked:answer": sum(map(len, tokens)) - sum(starts),
    }
    assert_same(results.over(["asked"]), routed.statistics(tokens))
    assert_same(results.over(["asked:prompt"]), routed.statistics([t[:n] for t, n in zip(tokens, starts)]))  # noqa: B905
    assert [t["name"] for t in results.texts["asked:answer"]] == ["asked.jsonl"]
    assert results.settings["generate"] == 6


def test_an_answer_ends_at_any_stop_token_of_generation_config(tmp_path: Path, texts: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in resolve(TINY).iterdir():
        (folder / file.name).symlink_to(file)
    model, text = load_model(TINY, dtype=F32), Text(TINY)
    prompt = text.encode(text.chat([{"role": "user", "content": QUESTIONS[0]}]))
    first = int(model(torch.tensor([prompt]))[0, -1].argmax())
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, first]}))
    write_lines(tmp_path / "q.jsonl", [conversation(QUESTIONS[0], None)])
    profile(folder, text_files([tmp_path / "q.jsonl"]), tmp_path / "s", generate=5, dtype=F32)
    assert lines_of(tmp_path / "s")[1]["tokens"] == [*prompt, first]


@pytest.mark.parametrize("left", ["a group", "a group and half a line", "a group and two answers"])
def test_interrupted_answers_are_resumed_by_groups(
    left: str, answered: ProfileResult, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "own.stats"
    file = tmp_path / "own.stats.answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(out, texts / "asked.jsonl", generate=6, progress=Recorder("answer", 3))
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 5  # what it is, and one group
    changed = json.loads(lines[1])
    changed["tokens"][-1] = 77
    lines[1] = json.dumps(changed) + "\n"
    whole = answered.output.with_name("own.stats.answers.jsonl").read_text().splitlines(keepends=True)
    extra = {"a group": "", "a group and half a line": whole[5][:20], "a group and two answers": whole[5]}[
        left
    ]
    file.write_text("".join(lines) + extra)
    printed = Recorder()
    run(out, texts / "asked.jsonl", generate=6, progress=printed)
    assert printed.stages[0] == ("answer", 6, [0, 4, 2])
    assert file.read_text().splitlines(keepends=True) == [*lines, *whole[5:]]  # what was changed is kept


def test_answers_of_another_job_are_generated_again(
    answered: ProfileResult, texts: Path, tmp_path: Path
) -> None:
    file = tmp_path / "own.stats.answers.jsonl"
    file.write_text(answered.output.with_name("own.stats.answers.jsonl").read_text())
    printed = Recorder()
    run(tmp_path / "own.stats", texts / "asked.jsonl", generate=5, progress=printed)
    assert printed.stages[0] == ("answer", 6, [0, 0, 4, 2])
    assert all(len(s["tokens"]) - s["answer"] <= 5 for s in lines_of(tmp_path / "own.stats")[1:])  # type: ignore


def test_an_answers_file_of_the_same_job_is_used_again(
    answered: ProfileResult, texts: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.stats.answers.jsonl").write_text(
        answered.output.with_name("own.stats.answers.jsonl").read_text()
    )
    printed = Recorder()
    results = run(tmp_path / "own.stats", texts / "asked.jsonl", generate=6, progress=printed)
    assert printed.stages[0] == ("answer", 6, [0, 6])
    assert results.output.read_bytes() == answered.output.read_bytes()


def test_a_damaged_answer_is_named(answered: ProfileResult, texts: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.stats.answers.jsonl"
    text = answered.output.with_name("own.stats.answers.jsonl").read_text().splitlines(keepends=True)
    file.write_text("".join([*text[:2], '{"domain": "asked"}\n', *text[3:]]))
    with pytest.raises(InvalidInputError, match=r"own\.stats\.answers\.jsonl: line 3 is damaged; delete"):
        run(tmp_path / "own.stats", texts / "asked.jsonl", generate=6)


def test_prompts_without_space_are_skipped_and_reported(
    texts: Path, text: Text, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lengths = sorted(len(text.encode(text.chat([{"role": "user", "content": q}]))) for q in QUESTIONS)
    run(tmp_path / "s", texts / "asked.jsonl", generate=3, context=lengths[0] + 3)
    fitting = sum(n == lengths[0] for n in lengths)
    assert fitting < 6
    assert len(lines_of(tmp_path / "s")) == 1 + fitting
    assert caplog.messages == [
        f"{6 - fitting} prompts leave no space for an answer in the context and were skipped"
    ]
    with pytest.raises(UsageError, match="no prompt leaves space for it in a context of 8 tokens"):
        run(tmp_path / "t", texts / "asked.jsonl", generate=3, context=8)


def test_max_tokens_bounds_answers_too(texts: Path, tmp_path: Path) -> None:
    results = run(tmp_path / "s", texts / "asked.jsonl", generate=4, max_tokens=60).statistics
    assert 30 < sum(results.tokens.values()) <= 60
    with pytest.raises(UsageError, match="and `max_tokens` 5"):
        run(tmp_path / "t", texts / "asked.jsonl", generate=4, max_tokens=5)
