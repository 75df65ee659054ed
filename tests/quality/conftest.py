"""Texts and models that the tests of measuring share."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from moe_surgery.checkpoint.resolve import resolve
from tests.support.sums import arithmetic

if TYPE_CHECKING:
    from moe_surgery.quality.job import ProfileResult
    from moe_surgery.runtime.model import CausalLM
    from moe_surgery.runtime.text import Text
    from tests.support.routed import Routed

SENTENCES = (
    "A checkpoint is a long row of numbers with a table of contents.",
    "Experts that are never asked are left out of the file, and the others move together.",
    "What remains answers as before where its experts were needed.",
)
QUESTIONS = ("What is 3 + 4?", "What is 12 - 5?", "Say something.", "What is 6 * 7?", "And 9 + 9?", "Why?")


def conversation(question: str, answer: str | None) -> dict[str, object]:
    messages = [{"role": "user", "content": question}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def write_lines(path: Path, values: list[object]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sums.txt (one text), words.jsonl (three), talk.jsonl (six answered), asked.jsonl (six not)."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "sums.txt").write_text(arithmetic(random.Random(7), 400))
    write_lines(folder / "words.jsonl", [{"text": s} for s in SENTENCES])
    answers = ("7", "7", "Numbers are patient.", "42", "18", "Because it was asked.")
    write_lines(folder / "talk.jsonl", [conversation(q, a) for q, a in zip(QUESTIONS, answers, strict=True)])
    write_lines(folder / "asked.jsonl", [conversation(q, None) for q in QUESTIONS])
    return folder


@pytest.fixture(scope="package", autouse=True)
def plain_pytorch() -> Iterator[None]:
    """Statistics are held against transformers' to 1e-5, which the native backend's 16 bits would not pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_SURGERY_NATIVE", "0")
        yield


@pytest.fixture(scope="session")
def text() -> Text:
    from moe_surgery.runtime.text import Text

    return Text("example:tiny")


@pytest.fixture(scope="session")
def tiny_model() -> CausalLM:
    """In float32."""
    import torch

    from moe_surgery.runtime.load import load_model

    return load_model("example:tiny", dtype=torch.float32, backend="reference")


@pytest.fixture(scope="session")
def routed() -> Routed:
    """transformers on the embedded checkpoint, in float32."""
    pytest.importorskip("transformers")
    from tests.support.routed import Routed

    return Routed(resolve("example:tiny"))


@pytest.fixture(scope="package")
def whole(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> ProfileResult:
    """Three domains in one batch."""
    from tests.quality.jobs import run

    out = tmp_path_factory.mktemp("whole") / "all.stats"
    return run(out, texts / "sums.txt", texts / "words.jsonl", texts / "talk.jsonl")


@pytest.fixture(scope="session")
def paths(texts: Path) -> list[Path]:
    return [texts / "sums.txt", texts / "words.jsonl", texts / "talk.jsonl"]
