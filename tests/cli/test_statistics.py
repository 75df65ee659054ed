"""profile and stats as commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from moe_surgery.kernels import select_backend
from moe_surgery.selection.statistics import load_statistics
from tests.support.command import call, done

Capture = pytest.CaptureFixture[str]
TINY = "example:tiny"
F32 = ("--dtype", "f32")


def test_profile_writes_statistics_and_says_what_they_are(
    inputs: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "s"
    texts = ["--texts", inputs / "sums.txt", "--texts", inputs / "talk.jsonl"]
    ended = done(call(capsys, "profile", TINY, *texts, "-o", out, *F32))
    both = load_statistics(inputs / "both.stats")
    for domain in ("sums", "talk:answer", "talk:prompt"):
        assert f"{domain}: {both.tokens[domain]:,} tokens" in ended.out
    assert "4 layers of 32 experts; next: moe-surgery plan" in ended.err
    assert out.read_bytes() == (inputs / "both.stats").read_bytes()
    printed = done(call(capsys, "profile", TINY, *texts, "-o", out, *F32, "--json", "-q"))
    assert printed.err == ""
    assert printed.json() == {
        "output": str(out),
        "checkpoint": both.identity,
        "tokens": both.tokens,
        "resumed_tokens": 0,
        "texts": both.texts,
        "settings": both.settings,
    }


def test_profile_takes_domains_bounds_and_generated_answers(
    inputs: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "s"
    options = ["--domain", "law", "--max-tokens", "30", "--context", "20", "--batch-tokens", "7"]
    ended = done(call(capsys, "profile", TINY, "--texts", inputs / "sums.txt", "-o", out, *options))
    assert ended.out.startswith("law: 30 tokens")
    assert "1 texts are longer than 20 tokens and were split" in ended.err
    import torch

    computed_in = str(select_backend(torch.device("cpu")).dtype).removeprefix("torch.")
    assert load_statistics(out).settings["dtype"] == computed_in
    ended = done(call(capsys, "profile", TINY, "--texts", inputs / "asked.jsonl", "-o", out, "--generate", 2))
    assert "asked:answer: " in ended.out
    assert load_statistics(out).settings["generate"] == 2


def test_merged_halves_are_the_whole_file(inputs: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "merged"
    files = [inputs / "sums.stats", inputs / "talk.stats"]
    ended = done(call(capsys, "stats", "merge", *files, "-o", out))
    assert f"{out}: 2 files merged" in ended.err
    merged, both = load_statistics(out), load_statistics(inputs / "both.stats")
    assert (merged.tokens, merged.texts, merged.settings) == (both.tokens, both.texts, both.settings)
    for domain in both.domains:
        for one, other in zip(merged.data[domain], both.data[domain], strict=True):
            np.testing.assert_array_equal(one.count, other.count)
            np.testing.assert_allclose(one.weighted_norm, other.weighted_norm, rtol=1e-5)
    printed = done(call(capsys, "stats", "merge", *files, "-o", out, "--json", "-q")).json()
    assert printed == {"output": str(out), "checkpoint": both.identity, "tokens": both.tokens}


def test_stats_show_says_what_is_in_a_file(inputs: Path, capsys: Capture) -> None:
    both = load_statistics(inputs / "both.stats")
    printed = done(call(capsys, "stats", "show", inputs / "both.stats", "--json")).json()
    assert printed["tokens"] == both.tokens
    assert (printed["layers"], printed["experts"], printed["top_k"]) == (4, 32, 4)
    assert printed["texts"]["sums"][0]["name"] == "sums.txt"
    ended = done(call(capsys, "stats", "show", inputs / "both.stats")).out
    assert both.identity in ended
    [row] = [line.split() for line in ended.splitlines() if line.split()[:1] == ["sums"]]
    gates = [np.sort(layer.gate)[::-1] for layer in both.data["sums"]]
    eight = [gate[:8].sum() / gate.sum() for gate in gates]
    assert row[1:3] == [str(both.tokens["sums"]), "1"]
    assert row[5:7] == [f"{np.mean(eight):.0%}", f"({min(eight):.0%})"]
