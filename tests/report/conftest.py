"""Pages and a browser, made once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_surgery.selection.statistics import Statistics
from tests.report.browser import MISSING, Browser, browser


@pytest.fixture(scope="session")
def real_statistics() -> Statistics:
    """The embedded checkpoint on the demo's texts."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("tokenizers")
    from moe_surgery import load_model
    from moe_surgery.demo import demo_texts
    from moe_surgery.measure.profile import profile_sequences
    from moe_surgery.runtime.text import Text

    text = Text("example:tiny")
    tokens = {name: [text.encode(words)] for name, words in demo_texts().items()}
    model = load_model("example:tiny", dtype=torch.float32)
    data = profile_sequences(model, tokens)
    counts = {name: len(sequence) for name, [sequence] in tokens.items()}
    texts: dict[str, list[dict[str, object]]] = {n: [{"name": n, "tokens": c}] for n, c in counts.items()}
    return Statistics("gpt_oss", "tiny", 32, 160, 4, counts, texts, data)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if MISSING:
        pytest.skip(f"needs a browser: {MISSING}")
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def page_file(tmp_path: Path) -> Path:
    return tmp_path / "report.html"
