"""The main job on the embedded checkpoint, as a first look and a smoke test."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from moe_surgery.errors import OutputError
from moe_surgery.examples.skills import DOMAINS, Question, documents, draw_questions
from moe_surgery.pipeline.planning import inspect
from moe_surgery.pipeline.pruning import prune
from moe_surgery.selection.plan import Plan, plan_from_ranking, plan_random
from moe_surgery.surgery.verify import verify_checkpoint

if TYPE_CHECKING:
    from moe_surgery.runtime.model import CausalLM
    from moe_surgery.runtime.text import Text
    from moe_surgery.selection.statistics import Statistics

__all__ = ["DemoResult", "DemoRow", "Example", "run_demo"]

SOURCE = "example:tiny"
KEPT = 8
METRIC = "weighted_ean"
RANDOM_SEED = 0
DOCUMENTS = 12
REPAIRED, REPAIRED_KEPT = "numbers", 3
REPAIR_DOCUMENTS, REPAIR_STEPS, REPAIR_BATCH = 20, 20, 512
QUESTIONS = 50
EXAMPLES = ("arithmetic", "python", "facts")
RATE_TOKENS = 48
LONGER = 4
"""Tokens that an answer may be longer than the longest right one; what follows cannot make it right."""
STATISTICS, REPORT = "tiny.stats", "report.html"


@dataclass(frozen=True, slots=True)
class DemoRow:
    """One model of the demo's table.

    `domain` is the one that its experts were chosen for: None for the full model and for random experts. `repaired`
    models had small tensors trained after that.
    Accuracies (shares of held-out questions answered right, by domain) and the decode rate need torch.
    """

    name: str
    domain: str | None
    experts: int
    nbytes: int
    verified: bool
    tokens_per_second: float | None = None
    accuracy: dict[str, float] = field(default_factory=dict)
    repaired: bool = False


@dataclass(frozen=True, slots=True)
class Example:
    """A question, its answer, and what each model (by name) answers."""

    domain: str
    question: str
    answer: str
    replies: dict[str, str]


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The models, example questions, and the report page where a folder was given."""

    rows: list[DemoRow]
    examples: list[Example]
    report: Path | None


def run_demo(output: Path | None, say: Callable[[str], None], *, questions: int = QUESTIONS) -> DemoResult:
    """Prune the embedded checkpoint to 8 of 32 experts for each of its domains, and ask every model questions.

    Experts are profiled on generated texts of each domain, plans made, models pruned and verified against
    the source. For numbers in words a model with 3 experts follows, as pruned and repaired. Each model is asked the
    same `questions` held-out ones of every domain, as are the full model and one with 8 random experts. Models, texts,
    statistics and a report page go to the new folder `output`; without it only the figures are kept. `say` is called
    with each step. Without torch nothing is profiled or asked, and one model with random experts is made. Raises
    OutputError if `output` exists.
    """
    full = inspect(SOURCE)
    runs = find_spec("torch") is not None and find_spec("tokenizers") is not None
    if not runs:
        say("torch or tokenizers is not installed: a model is pruned and verified, but not run")
    with ExitStack() as stack:
        folder = output or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if output is not None:
            try:
                output.mkdir(parents=True)
            except OSError as error:
                raise OutputError(f"{output}: cannot create: {error.strerror}") from error
        plans: dict[str, Plan] = {}
        report = None
        if runs:
            statistics = _profile(folder, say)
            plans = {domain: _plan(statistics, domain) for domain in DOMAINS}
            report = _report(statistics, plans, folder, say) if output is not None else None
        plans["random"] = plan_random(KEPT, RANDOM_SEED, full)
        paths: dict[str, str | Path] = {"full": SOURCE}
        rows = [DemoRow("full", None, full.experts, full.nbytes, verified=True)]
        for name, plan in plans.items():
            rows.append(_prune(name, plan, folder, say))
        if runs:
            rows += _repair(_plan(statistics, REPAIRED, REPAIRED_KEPT), folder, say)
        paths.update({row.name: folder / row.name for row in rows[1:]})
        if not runs:
            return DemoResult(rows, [], None)
        return DemoResult(*_ask(rows, paths, questions, say), report)


def profile_texts() -> dict[str, str]:
    """The text of each domain on which its experts are chosen; it has none of the questions asked."""
    return {domain: "\n".join(documents(domain, DOCUMENTS, seed=1)) for domain in DOMAINS}


def asked_questions(count: int) -> dict[str, list[Question]]:
    """The questions that every model is asked."""
    return {domain: draw_questions(domain, count, seed=1, held_out=True) for domain in DOMAINS}


def _profile(folder: Path, say: Callable[[str], None]) -> Statistics:
    from moe_surgery.quality.job import profile

    texts: dict[str, list[Path]] = {}
    for name, text in profile_texts().items():
        file = folder / f"{name}.txt"
        file.write_text(text)
        texts[name] = [file]
    options = " ".join(f"--domain {name}={name}.txt" for name in texts)
    say(f"profile {SOURCE} {options} -o {STATISTICS}")
    return profile(SOURCE, texts, folder / STATISTICS).statistics


def _plan(statistics: Statistics, domain: str, kept: int = KEPT) -> Plan:
    from moe_surgery.selection.rank import rank

    return plan_from_ranking(rank(statistics, METRIC, domains=[domain]), kept)


def _report(
    statistics: Statistics, plans: Mapping[str, Plan], folder: Path, say: Callable[[str], None]
) -> Path:
    """The report page of the statistics, with the plans that come from them."""
    from moe_surgery.checkpoint.fileops import FileOps
    from moe_surgery.checkpoint.writer import write_file
    from moe_surgery.report.page import build_report

    path = folder / REPORT
    say(f"report {STATISTICS} -o {REPORT}")
    named = [(f"{domain}-{KEPT}", plan) for domain, plan in plans.items()]
    write_file(
        path, build_report(statistics, named, [], "What the bundled model's experts do").encode(), FileOps()
    )
    return path


def _prune(name: str, plan: Plan, folder: Path, say: Callable[[str], None]) -> DemoRow:
    domain = None if name == "random" else name
    kept = len(plan.layers[0])
    name = f"{name}-{kept}"
    say(f"prune {SOURCE} {name}: {f'best experts for {domain}' if domain else 'random experts'}")
    program = prune(SOURCE, folder / name, plan).program
    verification = verify_checkpoint(folder / name, source=SOURCE)
    nbytes = sum(t.nbytes for s in program.shards for t in s.tensors)
    return DemoRow(name, domain, kept, nbytes, verification.ok)


def _repair(plan: Plan, folder: Path, say: Callable[[str], None]) -> list[DemoRow]:
    """The domain of `REPAIRED` with fewer experts, as pruned and repaired."""
    from dataclasses import replace

    import torch

    from moe_surgery.repairing import repair

    torch.set_num_threads(1)  # more only slow down a model this small
    pruned = _prune(REPAIRED, plan, folder, say)
    file, out = folder / f"{REPAIRED}.jsonl", folder / f"{pruned.name}-repaired"
    lines = (json.dumps({"text": text}) for text in documents(REPAIRED, REPAIR_DOCUMENTS, seed=1))
    file.write_text("\n".join(lines) + "\n")
    say(f"repair {pruned.name} --source {SOURCE} --texts {file.name} --norms -o {out.name}")
    repair(
        folder / pruned.name,
        {REPAIRED: [file]},
        out,
        source=SOURCE,
        norms=True,
        steps=REPAIR_STEPS,
        batch_tokens=REPAIR_BATCH,
    )
    verification = verify_checkpoint(out, source=SOURCE)
    return [pruned, replace(pruned, name=out.name, verified=verification.ok, repaired=True)]


def _ask(
    rows: list[DemoRow], paths: Mapping[str, str | Path], count: int, say: Callable[[str], None]
) -> tuple[list[DemoRow], list[Example]]:
    """`rows` with accuracies and decode rates, and the first question of some domains with its answers."""
    from dataclasses import replace

    import torch

    from moe_surgery.quality.exact_match import answer_line, exact_match
    from moe_surgery.runtime.load import load_model
    from moe_surgery.runtime.text import Text

    torch.set_num_threads(1)  # more only slow down a model this small
    asked = asked_questions(count)
    text = Text(SOURCE)
    longest = {domain: _longest_answer(text, drawn) + LONGER for domain, drawn in asked.items()}
    replies: dict[str, dict[str, list[str]]] = {}
    asked_rows = []
    for row in rows:
        say(f"ask {row.name}: {count} questions of each of {len(asked)} domains")
        model = load_model(paths[row.name])
        lines = {d: answer_line(model, text, [q.prompt for q in asked[d]], longest[d]) for d in asked}
        accuracy = {d: exact_match(lines[d], [q.answer for q in asked[d]]) for d in asked}
        rate = _decode_rate(model, text.encode(asked["arithmetic"][0].prompt))
        replies[row.name] = lines
        asked_rows.append(replace(row, accuracy=accuracy, tokens_per_second=rate))
    shown = {row.domain: row.name for row in reversed(rows)}
    examples = []
    for domain in EXAMPLES:
        models = ("full", shown[domain], f"random-{KEPT}")
        question = asked[domain][0]
        answers = {name: replies[name][domain][0] for name in models}
        examples.append(Example(domain, question.text, question.answer, answers))
    return asked_rows, examples


def _longest_answer(text: Text, questions: Sequence[Question]) -> int:
    """Tokens of the longest right answer."""
    return max(len(text.encode(f" {question.answer}")) for question in questions)


def _decode_rate(model: CausalLM, prompt: list[int]) -> float | None:
    """Tokens per second after the first, for one sequence."""
    from moe_surgery.runtime.generate import generate
    from moe_surgery.runtime.usage import Stopwatch

    watch = Stopwatch()
    generate(model, [prompt], max_new_tokens=RATE_TOKENS, stop_tokens=(), callback=lambda _: watch.step())
    return watch.decode_rate()
