"""Profiling from texts to a statistics file: what it holds, and how an interrupted run goes on."""

from __future__ import annotations

import gc
import json
import signal
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from moe_surgery.checkpoint.resolve import resolve  # noqa: E402
from moe_surgery.errors import InvalidInputError, OutputError, PlanMismatchError, UsageError  # noqa: E402
from moe_surgery.progress import Progress  # noqa: E402
from moe_surgery.quality import hidden_states as states  # noqa: E402
from moe_surgery.quality.corpus import open_corpus, text_files  # noqa: E402
from moe_surgery.quality.evaluate import evaluate  # noqa: E402
from moe_surgery.quality.job import ProfileResult, profile  # noqa: E402
from moe_surgery.quality.search import search  # noqa: E402
from moe_surgery.runtime.load import load_model  # noqa: E402
from moe_surgery.runtime.text import Text  # noqa: E402
from moe_surgery.selection.plan import Plan  # noqa: E402
from moe_surgery.selection.statistics import Statistics, load_statistics, merge  # noqa: E402
from tests.quality.conftest import QUESTIONS, conversation, write_lines  # noqa: E402
from tests.runtime.models import write_lively  # noqa: E402
from tests.support.checkpoints import Shape, Tensors, write_checkpoint  # noqa: E402
from tests.support.command import call, start_stopped, stop_with  # noqa: E402
from tests.support.routed import Routed, assert_same  # noqa: E402

TINY = "example:tiny"
F32 = torch.float32


def run(out: Path, *paths: Path, dtype: torch.dtype = F32, **options: object) -> ProfileResult:
    return profile(TINY, text_files(paths), out, dtype=dtype, **options)  # type: ignore[arg-type]


def sequences(text: Text, *paths: Path, context: int = 4096) -> dict[str, list[tuple[int, ...]]]:
    found: dict[str, list[tuple[int, ...]]] = {}
    for passage in open_corpus(text_files(paths), text, context=context):
        found.setdefault(passage.domain, []).append(passage.tokens)
    return found


def check(mine: Statistics, theirs: Statistics, rtol: float = 1e-5) -> None:
    assert (mine.tokens, mine.texts, mine.identity) == (theirs.tokens, theirs.texts, theirs.identity)
    assert mine.domains == theirs.domains
    for domain in mine.domains:
        assert_same(mine.data[domain], theirs.data[domain], rtol)


class Recorder:
    """Writes down the amounts by which each stage advances; raises KeyboardInterrupt at call `stop_at` of one."""

    def __init__(self, stop_in: str = "", stop_at: int = 0) -> None:
        self.stages: list[tuple[str, int, list[int]]] = []
        self._stop = stop_in, stop_at

    def __call__(self, progress: Progress) -> None:
        if not self.stages or self.stages[-1][0] != progress.stage:
            self.stages.append((progress.stage, progress.total, []))
        _, total, amounts = self.stages[-1]
        assert progress.total == total
        amounts.append(progress.done - sum(amounts))
        if (progress.stage, len(amounts)) == self._stop:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> ProfileResult:
    """Three domains in one batch."""
    out = tmp_path_factory.mktemp("whole") / "all.stats"
    return run(out, texts / "sums.txt", texts / "words.jsonl", texts / "talk.jsonl")


# --- what is in the file


def test_texts_become_what_hooks_on_transformers_see(
    whole: ProfileResult, texts: Path, text: Text, routed: Routed
) -> None:
    found = load_statistics(whole.output)
    assert (found.experts, found.hidden, found.layers, found.top_k) == (32, 160, 4, 4)
    expected = sequences(text, texts / "sums.txt", texts / "words.jsonl", texts / "talk.jsonl")
    assert found.named(["talk"]) == ["talk:answer", "talk:prompt"]
    for domain, passages in expected.items():
        assert_same(found.over([domain]), routed.statistics(passages))
        assert sum(found.tokens[d] for d in found.named([domain])) == sum(map(len, passages))


def test_the_answers_tokens_are_those_of_the_answers(whole: ProfileResult, texts: Path, text: Text) -> None:
    said = [json.loads(line)["messages"] for line in (texts / "talk.jsonl").read_text().splitlines()]
    answered = sum(len(text.encode(m[-1]["content"] + "<|end|>")) for m in said)
    assert whole.statistics.tokens["talk:answer"] == answered


@pytest.mark.parametrize("batch_tokens", [1])
def test_batches_of_any_size_give_the_same_statistics(
    batch_tokens: int, whole: ProfileResult, texts: Path, tmp_path: Path
) -> None:
    paths = (texts / "sums.txt", texts / "words.jsonl", texts / "talk.jsonl")
    found = run(tmp_path / "s", *paths, batch_tokens=batch_tokens)
    check(found.statistics, whole.statistics)
    assert found.statistics.settings == whole.statistics.settings


def test_halves_merged_are_the_whole(whole: ProfileResult, texts: Path, tmp_path: Path) -> None:
    one = run(tmp_path / "one", texts / "sums.txt", texts / "talk.jsonl").statistics
    other = run(tmp_path / "other", texts / "words.jsonl").statistics
    check(merge([one, other]), whole.statistics)
    with pytest.raises(PlanMismatchError, match=r"sums\.txt is in two"):
        merge([whole.statistics, one])


def test_halves_of_one_domain_merged_are_the_whole(texts: Path, tmp_path: Path) -> None:
    lines = (texts / "words.jsonl").read_text().splitlines(keepends=True)
    for folder, part in (("a", lines), ("b", lines[:1]), ("c", lines[1:])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "words.jsonl").write_text("".join(part))
    all_, *parts = (run(tmp_path / n / "s", tmp_path / n / "words.jsonl").statistics for n in "abc")
    merged = merge(parts)
    assert merged.tokens == all_.tokens
    assert_same(merged.data["words"], all_.data["words"])


def test_long_texts_are_split_and_it_is_said(
    texts: Path, text: Text, routed: Routed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = run(tmp_path / "s", texts / "sums.txt", context=50).statistics
    assert caplog.messages == ["1 texts are longer than 50 tokens and were split"]
    pieces = sequences(text, texts / "sums.txt", context=50)["sums"]
    assert len(pieces) > 2
    assert_same(found.data["sums"], routed.statistics(pieces))
    assert found.settings["context"] == 50


def test_bounded_texts_are_their_first_tokens(
    texts: Path, text: Text, routed: Routed, tmp_path: Path
) -> None:
    found = run(tmp_path / "s", texts / "sums.txt", max_tokens=33).statistics
    assert found.tokens == {"sums": 33}
    assert_same(found.data["sums"], routed.statistics([sequences(text, texts / "sums.txt")["sums"][0][:33]]))


def test_a_text_that_the_bound_left_unread_is_not_listed_and_may_be_added(
    texts: Path, tmp_path: Path
) -> None:
    files = text_files([texts / "sums.txt", texts / "words.jsonl"], ["x"])
    found = profile(TINY, files, tmp_path / "s", max_tokens=20, dtype=F32).statistics
    assert [t["name"] for t in found.texts["x"]] == ["sums.txt"]
    rest = profile(TINY, files[1:], tmp_path / "t", dtype=F32).statistics
    assert merge([found, rest]).tokens["x"] == 20 + rest.tokens["x"]


def test_one_token_leaves_most_experts_unchosen(text: Text, routed: Routed, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("One")
    found = run(tmp_path / "s", tmp_path / "x.txt", max_tokens=1).statistics
    assert [int((layer.count > 0).sum()) for layer in found.data["x"]] == [4] * 4
    assert_same(found.data["x"], routed.statistics([text.encode("One")[:1]]))
    assert (load_statistics(tmp_path / "s").data["x"][0].norm[found.data["x"][0].count == 0] == 0).all()


@pytest.mark.parametrize("top_k", [None, 1])
def test_a_sequential_profile_masks_earlier_routers(
    top_k: int | None, texts: Path, text: Text, routed: Routed, tmp_path: Path
) -> None:
    rng = np.random.default_rng(2)
    plan = Plan("gpt_oss", 32, tuple(tuple(int(e) for e in rng.permutation(32)[:7]) for _ in range(4)), top_k)
    found = run(tmp_path / "s", texts / "words.jsonl", sequential=plan, batch_tokens=20).statistics
    expected = routed.sequential(sequences(text, texts / "words.jsonl")["words"], plan.layers, top_k)
    assert_same(found.data["words"], expected, rtol=2e-5)
    assert found.settings["sequential"] == json.loads(json.dumps(plan.as_dict()))


def test_hidden_states_in_a_file_give_the_same(
    whole: ProfileResult, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = run(tmp_path / "s", texts / "sums.txt", texts / "words.jsonl", texts / "talk.jsonl")
    check(found.statistics, whole.statistics, rtol=0)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("dtype", [None, F32])
def test_every_command_takes_the_default_backend_and_says_which(
    dtype: torch.dtype | None, texts: Path, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOE_SURGERY_NATIVE")
    words = texts / "words.jsonl"
    whole = load_model(TINY, dtype=dtype)
    said = {
        "backend": whole.backend.name,
        "device": "cpu",
        "dtype": str(whole.dtype).removeprefix("torch."),
    }
    profiled = profile(TINY, text_files([words]), tmp_path / "s", max_tokens=8, dtype=dtype)
    ranking = search(TINY, text_files([words]), tmp_path / "r.json", max_tokens=8, dtype=dtype)
    plan = Plan("gpt_oss", 32, ((0, 1),) * 4)
    evaluation = evaluate(TINY, [words], context=64, max_tokens=8, plans=[("two", plan)], dtype=dtype)
    found = [profiled.statistics.settings, ranking.provenance["settings"], evaluation.settings]
    for settings in found:
        assert isinstance(settings, dict)
        assert {key: settings[key] for key in said} == said


def test_the_commands_print_the_backend(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.json").write_text(Plan("gpt_oss", 32, ((0, 1),) * 4).to_json())
    given = ("--texts", texts / "words.jsonl", "--max-tokens", "8", "--dtype", "f32")
    line = "computed by backend reference on device cpu in float32"
    for command in (
        ("profile", TINY, *given, "-o", tmp_path / "s"),
        ("search", TINY, *given, "-o", tmp_path / "r.json"),
        ("evaluate", TINY, *given, "--plan", tmp_path / "p.json"),
    ):
        told = call(capsys, *command)
        assert told.code == 0, told.err
        assert line in told.err.splitlines()
    assert line in call(capsys, "stats", "show", tmp_path / "s").out.splitlines()


# --- interruption


def interrupted(out: Path, paths: Sequence[Path], calls: int, **options: object) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(out, *paths, progress=Recorder("profile", calls), **options)
    assert not out.exists()


def test_an_interrupted_run_goes_on_after_its_last_batch(texts: Path, tmp_path: Path) -> None:
    paths = [texts / "words.jsonl", texts / "talk.jsonl"]
    undisturbed = run(tmp_path / "whole", *paths, batch_tokens=40)
    out = tmp_path / "s"
    # The first call tells what was kept; then a call for each of 4 layers of a batch.
    interrupted(out, paths, 1 + 4 * 2 + 1, batch_tokens=40)
    told = Recorder()
    found = run(out, *paths, batch_tokens=40, progress=told)
    assert out.read_bytes() == undisturbed.output.read_bytes()
    [(_, total, done)] = told.stages
    assert 0 < found.resumed_tokens < sum(found.statistics.tokens.values())
    assert done[0] == 4 * found.resumed_tokens
    assert sum(done) == total == 4 * sum(found.statistics.tokens.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s", "whole"]


def test_what_a_run_left_is_really_taken_up(texts: Path, tmp_path: Path) -> None:
    """A sum that was changed in the partial file shows in the result."""
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    out, paths = tmp_path / "s", [texts / "words.jsonl"]
    interrupted(out, paths, 1 + 4 + 1, batch_tokens=20)
    partial = tmp_path / ".s.partial"
    with safe_open(partial, "np") as opened:
        metadata = opened.metadata()
    arrays = load_file(partial)
    arrays["layer.1.words.gate"] = arrays["layer.1.words.gate"] + 1000
    save_file(arrays, partial, metadata)
    found = run(out, *paths, batch_tokens=20)
    plain = run(tmp_path / "plain", *paths, batch_tokens=20)
    gained = found.statistics.data["words"][1].gate - plain.statistics.data["words"][1].gate
    np.testing.assert_allclose(gained, 1000)


OTHERS: dict[str, dict[str, object]] = {
    "other batches": {"batch_tokens": 21},
    "another bound": {"max_tokens": 40},
    "another context": {"context": 30},
    "another dtype": {"dtype": torch.bfloat16},
    "another backend": {"backend": "reference-invariant"},
    "another plan": {"sequential": Plan("gpt_oss", 32, ((1, 2),) * 4)},
    "another top-k": {"sequential": Plan("gpt_oss", 32, ((0, 1),) * 4, 1)},
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_another_job_left_is_not_taken_up(case: str, texts: Path, tmp_path: Path) -> None:
    options: dict[str, object] = {"batch_tokens": 20}
    if "top-k" in case or "plan" in case:
        options["sequential"] = Plan("gpt_oss", 32, ((0, 1),) * 4)
    out, paths = tmp_path / "s", [texts / "words.jsonl"]
    interrupted(out, paths, 1 + 4 + 1, **options)
    options |= OTHERS[case]
    found = run(out, *paths, **options)  # type: ignore[arg-type]
    assert found.resumed_tokens == 0
    assert out.read_bytes() == run(tmp_path / "fresh", *paths, **options).output.read_bytes()  # type: ignore[arg-type]


def test_what_a_run_left_of_other_texts_is_not_taken_up(texts: Path, tmp_path: Path) -> None:
    out, changed = tmp_path / "s", tmp_path / "words.jsonl"
    changed.write_bytes((texts / "words.jsonl").read_bytes())
    interrupted(out, [changed], 1 + 4 + 1, batch_tokens=20)
    changed.write_bytes(changed.read_bytes().replace(b"patient", b"") + b'"one more"\n')
    assert run(out, changed, batch_tokens=20).resumed_tokens == 0


@pytest.mark.parametrize("left", [b"", b"nothing of ours", b"\x10" + b"\0" * 7 + b'{"a":1}         '])
def test_a_damaged_partial_file_is_not_taken_up(left: bytes, texts: Path, tmp_path: Path) -> None:
    (tmp_path / ".s.partial").write_bytes(left)
    (tmp_path / "..s.partial.tmp").write_bytes(left)  # a run was killed while it saved
    (tmp_path / ".s.tmp").write_bytes(left)
    found = run(tmp_path / "s", texts / "words.jsonl")
    assert found.resumed_tokens == 0
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


@pytest.fixture(scope="module")
def many(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> ProfileResult:
    """Many batches; the texts lie beside the statistics."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "many.jsonl").write_text((texts / "words.jsonl").read_text() * 5)
    return run(folder / "s", folder / "many.jsonl", batch_tokens=20)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_process_leaves_what_the_next_run_finishes(
    sent: signal.Signals, many: ProfileResult, tmp_path: Path
) -> None:
    source = many.output.with_name("many.jsonl")
    out, partial = tmp_path / "s", tmp_path / ".s.partial"
    options = ("--texts", source, "--dtype", "f32", "--batch-tokens", "20", "-o", out)
    process = start_stopped(r"\.partial\.tmp$", 3, "profile", TINY, *options)
    assert partial.exists()
    stopped = stop_with(process, sent)
    assert stopped.code == (130 if sent == signal.SIGINT else -signal.SIGKILL)
    if sent == signal.SIGINT:
        assert "interrupted; the same command resumes after the last finished batch" in stopped.error
    assert not out.exists()
    found = run(out, source, batch_tokens=20)
    assert found.resumed_tokens > 0
    assert out.read_bytes() == many.output.read_bytes()


# --- generated answers


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
    told = lines_of(answered.output)[1:]
    assert len(told) == len(QUESTIONS)
    for question, said in zip(QUESTIONS, told, strict=True):
        prompt = text.encode(text.chat([{"role": "user", "content": question}]))
        assert said == {"domain": "asked", "tokens": greedy(routed, prompt, 6), "answer": len(prompt)}


def test_prompts_and_their_answers_are_counted_apart_and_add_up(
    answered: ProfileResult, routed: Routed
) -> None:
    found, told = answered.statistics, lines_of(answered.output)[1:]
    tokens = [list(said["tokens"]) for said in told]  # type: ignore[call-overload]
    starts = [int(str(said["answer"])) for said in told]
    assert found.tokens == {
        "asked:prompt": sum(starts),
        "asked:answer": sum(map(len, tokens)) - sum(starts),
    }
    assert_same(found.over(["asked"]), routed.statistics(tokens))
    assert_same(found.over(["asked:prompt"]), routed.statistics([t[:n] for t, n in zip(tokens, starts)]))  # noqa: B905
    assert [t["name"] for t in found.texts["asked:answer"]] == ["asked.jsonl"]
    assert found.settings["generate"] == 6


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
def test_interrupted_answers_are_taken_up_by_groups(
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
    told = Recorder()
    run(out, texts / "asked.jsonl", generate=6, progress=told)
    assert told.stages[0] == ("answer", 6, [0, 4, 2])
    assert file.read_text().splitlines(keepends=True) == [*lines, *whole[5:]]  # what was changed is kept


def test_answers_of_another_job_are_made_anew(answered: ProfileResult, texts: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.stats.answers.jsonl"
    file.write_text(answered.output.with_name("own.stats.answers.jsonl").read_text())
    told = Recorder()
    run(tmp_path / "own.stats", texts / "asked.jsonl", generate=5, progress=told)
    assert told.stages[0] == ("answer", 6, [0, 0, 4, 2])
    assert all(len(s["tokens"]) - s["answer"] <= 5 for s in lines_of(tmp_path / "own.stats")[1:])  # type: ignore


def test_an_answers_file_of_the_same_job_is_used_again(
    answered: ProfileResult, texts: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.stats.answers.jsonl").write_text(
        answered.output.with_name("own.stats.answers.jsonl").read_text()
    )
    told = Recorder()
    found = run(tmp_path / "own.stats", texts / "asked.jsonl", generate=6, progress=told)
    assert told.stages[0] == ("answer", 6, [0, 6])
    assert found.output.read_bytes() == answered.output.read_bytes()


def test_a_damaged_answer_is_named(answered: ProfileResult, texts: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.stats.answers.jsonl"
    text = answered.output.with_name("own.stats.answers.jsonl").read_text().splitlines(keepends=True)
    file.write_text("".join([*text[:2], '{"domain": "asked"}\n', *text[3:]]))
    with pytest.raises(InvalidInputError, match=r"own\.stats\.answers\.jsonl: line 3 is damaged; delete"):
        run(tmp_path / "own.stats", texts / "asked.jsonl", generate=6)


def test_prompts_without_room_are_skipped_and_it_is_said(
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
    found = run(tmp_path / "s", texts / "asked.jsonl", generate=4, max_tokens=60).statistics
    assert 30 < sum(found.tokens.values()) <= 60
    with pytest.raises(UsageError, match="and `max_tokens` 5"):
        run(tmp_path / "t", texts / "asked.jsonl", generate=4, max_tokens=5)


# --- one layer at a time


def test_of_a_layered_model_one_layer_is_held() -> None:
    model = load_model(TINY, dtype=F32, one_layer=True)
    held = weakref.ref(model.layers[0].experts.gate_up.blocks)
    assert held() is not None
    assert model.layers[0].experts.gate_up.blocks is held()
    assert model.layers[1].top_k == 4
    gc.collect()
    assert held() is None
    with pytest.raises(IndexError):
        model.layers[4]
    with pytest.raises(IndexError):
        model.layers[-1]
    assert len(model.layers) == len(list(model.layers)) == 4


def resident(folder: Path) -> int:
    """Bytes of the files below `folder` that are mapped into this process and present."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.split()[0].endswith(":"):
            if inside and line.startswith("Rss:"):
                found += int(line.split()[1]) * 1024
        else:
            inside = str(folder) in line
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="tells of mapped pages on Linux")
def test_pages_of_a_layer_are_let_go_for_the_next(tmp_path: Path) -> None:
    shape = Shape(4, 32, 4, 256, 512, 4, 2, 16, 64)
    folder = write_checkpoint(tmp_path / "model", shape)
    layer = 32 * (2 * 512 * 256 + 256 * 512) * 17 // 32
    model = load_model(folder, one_layer=True)
    most = 0
    for number in range(4):
        experts = model.layers[number].experts
        for weight in (experts.gate_up, experts.down):
            weight.blocks.sum()
            weight.scales.sum()
        most = max(most, resident(folder))
    assert layer * 0.9 < most < layer * 1.5
    whole = load_model(folder)
    for one in whole.layers:
        one.experts.gate_up.blocks.sum()
        one.experts.down.blocks.sum()
    assert resident(folder) > layer * 3


# --- what is refused


def test_what_cannot_be_meant_is_refused_before_any_work(texts: Path, tmp_path: Path) -> None:
    words = texts / "words.jsonl"
    for options, complaint in (
        ({"batch_tokens": 0}, "`batch_tokens` 0: must be at least 1"),
        ({"max_tokens": 0}, "`max_tokens` 0"),
        ({"context": 4097}, "`context` 4097: this model supports 1 to 4096 tokens"),
        ({"context": 0}, "`context` 0"),
    ):
        with pytest.raises(UsageError, match=complaint):
            run(tmp_path / "s", words, **options)
    with pytest.raises(UsageError, match="`generate` 0: must be at least 1"):
        run(tmp_path / "s", texts / "asked.jsonl", generate=0)
    with pytest.raises(InvalidInputError, match="answers are generated for conversations"):
        run(tmp_path / "s", words, generate=3)
    with pytest.raises(PlanMismatchError, match="the plan is for gpt_oss with 4 layers of 8 experts"):
        run(tmp_path / "s", words, sequential=Plan("gpt_oss", 8, ((0,),) * 4))
    with pytest.raises(OutputError, match="no such folder"):
        run(tmp_path / "none" / "s", words)
    with pytest.raises(OutputError, match="is a folder"):
        run(tmp_path, words)
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_no_numbers_are_refused(tmp_path: Path, texts: Path) -> None:
    def overflowing(tensors: Tensors) -> None:
        tensors["model.layers.1.mlp.experts.down_proj_bias"][:] = 0x7F00  # BF16 1.7e38: infinite in F16

    shape = Shape(layers=3, experts=5, top_k=2, vocabulary=2048)
    folder = write_lively(tmp_path / "model", shape, edit_tensors=overflowing)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((resolve(TINY) / name).read_bytes())
    files = text_files([texts / "words.jsonl"])
    with pytest.raises(
        InvalidInputError, match=r"model: layer 1 gives numbers that are not finite; try a larger `dtype`"
    ):
        profile(folder, files, tmp_path / "s", dtype=torch.float16)
    assert not (tmp_path / "s").exists()
