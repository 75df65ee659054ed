"""Pages and a browser, made once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.made_up_trace import made_up_trace
from moe_surgery.quality.evaluation import Evaluation
from moe_surgery.quality.routing_trace import Trace
from moe_surgery.report.page import build_report
from moe_surgery.report.trace_page import build_trace_page
from moe_surgery.selection.plan import Plan, plan_random
from moe_surgery.selection.statistics import Statistics
from tests.report.browser import MISSING, Browser, browser
from tests.report.inputs import evaluation_of, made_up, plan_of


@dataclass(frozen=True)
class Real:
    """The embedded checkpoint's statistics on generated texts, plans from them, and what those cost."""

    statistics: Statistics
    plans: list[tuple[str, Plan]]
    evaluation: Evaluation


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    torch = pytest.importorskip("torch")
    pytest.importorskip("tokenizers")
    from moe_surgery.examples.skills import documents
    from moe_surgery.pipeline.planning import inspect
    from moe_surgery.quality.corpus import text_files
    from moe_surgery.quality.evaluate import evaluate
    from moe_surgery.quality.job import profile

    folder = tmp_path_factory.mktemp("texts")
    for name, domain in (("arithmetic", "arithmetic"), ("code", "python"), ("prose", "facts")):
        (folder / f"{name}.txt").write_text("\n".join(documents(domain, 4, seed=0)))
    files = text_files(sorted(folder.iterdir()))
    done = profile("example:tiny", files, folder / "tiny.stats", dtype=torch.float32)
    drawn = [(f"random-8-{s}.json", plan_random(8, s, inspect("example:tiny"))) for s in range(2)]
    plans = [(f"reap-code-{n}.json", plan_of(done.statistics, "reap", n, ["code"])) for n in (8, 16)] + drawn
    return Real(done.statistics, plans, evaluate("example:tiny", files, plans=plans, dtype=torch.float32))


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if MISSING:
        pytest.skip(f"needs a browser: {MISSING}")
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="session")
def large_trace() -> Trace:
    """The largest size that the trace page is made for, and a text of 400 tokens."""
    return made_up_trace(94, 512, 400)


@pytest.fixture(scope="session")
def large_page(large_trace: Trace) -> str:
    return build_trace_page(large_trace)


@pytest.fixture
def page_file(tmp_path: Path) -> Path:
    return tmp_path / "report.html"


@pytest.fixture
def statistics() -> Statistics:
    return made_up(24, 32, ["chemistry", "code", "law", "maths"])


@pytest.fixture
def page(statistics: Statistics, page_file: Path) -> Path:
    plans = [
        ("law-8.json", plan_of(statistics, "reap", 8, ["law"])),
        ("all-16.json", plan_of(statistics, "gate", 16)),
    ]
    page_file.write_text(build_report(statistics, plans, [("cuts.json", evaluation_of(statistics))]))
    return page_file
