"""Profiling from texts to a statistics file: what it contains, memory, and errors."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from moe_surgery.checkpoint.resolve import resolve  # noqa: E402
from moe_surgery.errors import InvalidInputError, OutputError, PlanMismatchError, UsageError  # noqa: E402
from moe_surgery.quality import hidden_states as states  # noqa: E402
from moe_surgery.quality.corpus import text_files  # noqa: E402
from moe_surgery.quality.evaluate import evaluate  # noqa: E402
from moe_surgery.quality.job import ProfileResult, profile  # noqa: E402
from moe_surgery.quality.search import search  # noqa: E402
from moe_surgery.runtime.load import load_model  # noqa: E402
from moe_surgery.runtime.text import Text  # noqa: E402
from moe_surgery.selection.plan import Plan  # noqa: E402
from moe_surgery.selection.statistics import load_statistics, merge  # noqa: E402
from tests.quality.jobs import F32, TINY, check, run, sequences  # noqa: E402
from tests.runtime.models import write_lively  # noqa: E402
from tests.support.checkpoints import Shape, Tensors, write_checkpoint  # noqa: E402
from tests.support.command import call  # noqa: E402
from tests.support.routed import Routed, assert_same  # noqa: E402


def test_texts_become_what_hooks_on_transformers_see(
    whole: ProfileResult, texts: Path, text: Text, routed: Routed
) -> None:
    results = load_statistics(whole.output)
    assert (results.experts, results.hidden, results.layers, results.top_k) == (32, 160, 4, 4)
    expected = sequences(text, texts / "sums.txt", texts / "words.jsonl", texts / "talk.jsonl")
    assert results.named(["talk"]) == ["talk:answer", "talk:prompt"]
    for domain, passages in expected.items():
        assert_same(results.over([domain]), routed.statistics(passages))
        assert sum(results.tokens[d] for d in results.named([domain])) == sum(map(len, passages))


def test_the_answers_tokens_are_those_of_the_answers(whole: ProfileResult, texts: Path, text: Text) -> None:
    result = [json.loads(line)["messages"] for line in (texts / "talk.jsonl").read_text().splitlines()]
    answered = sum(len(text.encode(m[-1]["content"] + "<|end|>")) for m in result)
    assert whole.statistics.tokens["talk:answer"] == answered


@pytest.mark.parametrize("batch_tokens", [1])
def test_batches_of_any_size_give_the_same_statistics(
    batch_tokens: int, whole: ProfileResult, texts: Path, tmp_path: Path
) -> None:
    paths = (texts / "sums.txt", texts / "words.jsonl", texts / "talk.jsonl")
    results = run(tmp_path / "s", *paths, batch_tokens=batch_tokens)
    check(results.statistics, whole.statistics)
    assert results.statistics.settings == whole.statistics.settings


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


def test_long_texts_are_split_and_reported(
    texts: Path, text: Text, routed: Routed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = run(tmp_path / "s", texts / "sums.txt", context=50).statistics
    assert caplog.messages == ["1 texts are longer than 50 tokens and were split"]
    pieces = sequences(text, texts / "sums.txt", context=50)["sums"]
    assert len(pieces) > 2
    assert_same(results.data["sums"], routed.statistics(pieces))
    assert results.settings["context"] == 50


def test_bounded_texts_are_their_first_tokens(
    texts: Path, text: Text, routed: Routed, tmp_path: Path
) -> None:
    results = run(tmp_path / "s", texts / "sums.txt", max_tokens=33).statistics
    assert results.tokens == {"sums": 33}
    assert_same(
        results.data["sums"], routed.statistics([sequences(text, texts / "sums.txt")["sums"][0][:33]])
    )


def test_a_text_that_the_bound_left_unread_is_not_listed_and_may_be_added(
    texts: Path, tmp_path: Path
) -> None:
    files = text_files([texts / "sums.txt", texts / "words.jsonl"], ["x"])
    results = profile(TINY, files, tmp_path / "s", max_tokens=20, dtype=F32).statistics
    assert [t["name"] for t in results.texts["x"]] == ["sums.txt"]
    rest = profile(TINY, files[1:], tmp_path / "t", dtype=F32).statistics
    assert merge([results, rest]).tokens["x"] == 20 + rest.tokens["x"]


def test_one_token_leaves_most_experts_unchosen(text: Text, routed: Routed, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("One")
    results = run(tmp_path / "s", tmp_path / "x.txt", max_tokens=1).statistics
    assert [int((layer.count > 0).sum()) for layer in results.data["x"]] == [4] * 4
    assert_same(results.data["x"], routed.statistics([text.encode("One")[:1]]))
    assert (load_statistics(tmp_path / "s").data["x"][0].norm[results.data["x"][0].count == 0] == 0).all()


@pytest.mark.parametrize("top_k", [None, 1])
def test_a_sequential_profile_masks_earlier_routers(
    top_k: int | None, texts: Path, text: Text, routed: Routed, tmp_path: Path
) -> None:
    rng = np.random.default_rng(2)
    plan = Plan("gpt_oss", 32, tuple(tuple(int(e) for e in rng.permutation(32)[:7]) for _ in range(4)), top_k)
    results = run(tmp_path / "s", texts / "words.jsonl", sequential=plan, batch_tokens=20).statistics
    expected = routed.sequential(sequences(text, texts / "words.jsonl")["words"], plan.layers, top_k)
    assert_same(results.data["words"], expected, rtol=2e-5)
    assert results.settings["sequential"] == json.loads(json.dumps(plan.as_dict()))


def test_hidden_states_in_a_file_give_the_same(
    whole: ProfileResult, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    results = run(tmp_path / "s", texts / "sums.txt", texts / "words.jsonl", texts / "talk.jsonl")
    check(results.statistics, whole.statistics, rtol=0)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("dtype", [None, F32])
def test_every_command_takes_the_default_backend_and_says_which(
    dtype: torch.dtype | None, texts: Path, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOE_SURGERY_NATIVE")
    words = texts / "words.jsonl"
    whole = load_model(TINY, dtype=dtype)
    result = {
        "backend": whole.backend.name,
        "device": "cpu",
        "dtype": str(whole.dtype).removeprefix("torch."),
    }
    profiled = profile(TINY, text_files([words]), tmp_path / "s", max_tokens=8, dtype=dtype)
    ranking = search(TINY, text_files([words]), tmp_path / "r.json", max_tokens=8, dtype=dtype)
    plan = Plan("gpt_oss", 32, ((0, 1),) * 4)
    evaluation = evaluate(TINY, [words], context=64, max_tokens=8, plans=[("two", plan)], dtype=dtype)
    results = [profiled.statistics.settings, ranking.provenance["settings"], evaluation.settings]
    for settings in results:
        assert isinstance(settings, dict)
        assert {key: settings[key] for key in result} == result


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
        printed = call(capsys, *command)
        assert printed.code == 0, printed.err
        assert line in printed.err.splitlines()
    assert line in call(capsys, "stats", "show", tmp_path / "s").out.splitlines()


def test_of_a_layered_model_one_layer_is_held() -> None:
    model = load_model(TINY, dtype=F32, one_layer=True)
    stored = weakref.ref(model.layers[0].experts.gate_up.blocks)
    assert stored() is not None
    assert model.layers[0].experts.gate_up.blocks is stored()
    assert model.layers[1].top_k == 4
    gc.collect()
    assert stored() is None
    with pytest.raises(IndexError):
        model.layers[4]
    with pytest.raises(IndexError):
        model.layers[-1]
    assert len(model.layers) == len(list(model.layers)) == 4


def resident(folder: Path) -> int:
    """Bytes of the files below `folder` that are mapped into this process and present."""
    results, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.split()[0].endswith(":"):
            if inside and line.startswith("Rss:"):
                results += int(line.split()[1]) * 1024
        else:
            inside = str(folder) in line
    return results


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="tells of mapped pages on Linux")
def test_pages_of_a_layer_are_read_ahead_and_released_for_the_next(tmp_path: Path) -> None:
    shape = Shape(4, 32, 4, 256, 512, 4, 2, 16, 64)
    folder = write_checkpoint(tmp_path / "model", shape)
    layer = 32 * (2 * 512 * 256 + 256 * 512) * 17 // 32
    model = load_model(folder, one_layer=True)
    assert len(model.layers[0].experts.down_bias) == 32
    for thread in threading.enumerate():
        if thread.name == "moe-surgery-read-ahead":
            thread.join()
    assert resident(folder) > layer * 0.9  # of layer 1: nothing has used layer 0
    most = 0
    for number in range(4):
        experts = model.layers[number].experts
        for weight in (experts.gate_up, experts.down):
            weight.blocks.sum()
            weight.scales.sum()
        most = max(most, resident(folder))
    assert layer * 0.9 < most < layer * 2.5  # the next one is being read in
    whole = load_model(folder)
    for one in whole.layers:
        one.experts.gate_up.blocks.sum()
        one.experts.down.blocks.sum()
    assert resident(folder) > layer * 3


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


def test_outputs_that_are_not_numbers_are_refused(tmp_path: Path, texts: Path) -> None:
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
