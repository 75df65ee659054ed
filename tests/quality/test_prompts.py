"""Prompts are the beginnings of texts, by domain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")

from moe_surgery.errors import UsageError
from moe_surgery.quality.corpus import Corpus, open_corpus, text_files
from moe_surgery.quality.prompts import prompts_of
from moe_surgery.runtime.text import Text

LONG, SHORT = "Question: What is 7 + 5?\nAnswer: 7 + 5 = 12.\n", "a"


def corpus(tmp_path: Path, **domains: list[object]) -> Corpus:
    paths = []
    for name, lines in domains.items():
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return open_corpus(text_files(paths), Text("example:tiny"), context=4096)


def test_prompts_are_the_beginnings_of_texts_long_enough(tmp_path: Path) -> None:
    text = Text("example:tiny")
    math = [{"text": t} for t in (LONG, SHORT, "def f():\n    return 1 + 1\n", LONG)]
    given = corpus(tmp_path, math=math, other=[{"text": SHORT}])
    result = prompts_of(given, 8, 2)
    assert result == {"math": [text.encode(LONG)[:8], text.encode("def f():\n    return 1 + 1\n")[:8]]}
    assert len(prompts_of(given, 8)["math"]) == 3
    with pytest.raises(
        UsageError, match="`texts`: none has 500 tokens; pass longer ones or a smaller `prompt_tokens`"
    ):
        prompts_of(given, 500)


def test_a_conversation_is_asked_up_to_its_answer(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    requested = {"role": "user", "content": "What is 2 + 2?"}
    lines: list[object] = [
        {"messages": [requested, {"role": "assistant", "content": "4"}]},
        {"messages": [requested]},
    ]
    text = Text("example:tiny")
    expected = text.encode(text.chat([requested]))
    assert prompts_of(corpus(tmp_path, sums=lines), 3) == {"sums": [expected, expected]}
