"""The main job on the embedded checkpoint, as a first look and a smoke test."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from moe_surgery.errors import OutputError
from moe_surgery.pipeline.planning import inspect
from moe_surgery.pipeline.pruning import prune
from moe_surgery.selection.plan import plan_from_ranking, plan_random
from moe_surgery.selection.ranking import Ranking
from moe_surgery.surgery.verify import verify_checkpoint

__all__ = ["DemoRow", "run_demo"]

SOURCE = "example:tiny"
# Experts kept, their format, and how they are chosen.
JOBS = (
    (16, "mxfp4", "chosen"),
    (8, "mxfp4", "chosen"),
    (4, "mxfp4", "chosen"),
    (8, "bf16", "chosen"),
    (8, "mxfp4", "random"),
)
METRIC = "weighted_ean"
PROMPT = "Question: What is 7 + 5?\nAnswer:"
NEW_TOKENS = 48
TEXT_CHARACTERS = 1500
PROSE = (
    "A checkpoint is a long row of numbers with a table of contents. To make it smaller, you do not have to "
    "understand every number: it is enough to know which of them belong to an expert that is never asked. "
    "Those are left out, the others move together, and the table of contents is written again. What remains "
    "answers as before where its experts were needed, and worse where they were not."
)


@dataclass(frozen=True, slots=True)
class DemoRow:
    """One model of the demo's table. Rates and losses (nats per token, by text) need torch."""

    name: str
    experts: int
    top_k: int
    parameters: int
    nbytes: int
    verified: bool
    tokens_per_second: float | None = None
    losses: dict[str, float] = field(default_factory=dict)
    sample: str | None = None


def run_demo(output: Path | None, say: Callable[[str], None]) -> list[DemoRow]:
    """Profile the embedded checkpoint, prune it to several sizes, verify each against its source, run it.

    Models go to the new folder `output`, or to a temporary one. `say` is called with each step. The first
    row is the full model. Without torch nothing is profiled or generated, and all experts are chosen at
    random. Raises OutputError if `output` exists.
    """
    full = inspect(SOURCE)
    runs = find_spec("torch") is not None and find_spec("tokenizers") is not None
    if not runs:
        say("torch or tokenizers is not installed: models are pruned and verified, but not run")
    with ExitStack() as stack:
        folder = output or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if output is not None:
            try:
                output.mkdir()
            except OSError as error:
                raise OutputError(f"{output}: cannot create: {error.strerror}") from error
        first = DemoRow("full", full.experts, full.top_k, full.parameters, full.nbytes, True)
        rows = [_run(first, SOURCE, say) if runs else first]
        ranking = _ranking(folder, say) if runs else None
        for experts, dtype, choice in JOBS:
            chosen = ranking is not None and choice == "chosen"
            name = f"tiny-{experts}-{dtype if choice == 'chosen' else choice}"
            method = f"best by {METRIC}" if chosen else "random"
            say(f"prune {SOURCE} {name}: {experts} of {full.experts} experts, {method}, {dtype}")
            plan = plan_random(experts, 0, full)
            if chosen:
                assert ranking is not None
                plan = plan_from_ranking(ranking, experts)
            program = prune(SOURCE, folder / name, plan, store=dtype).program
            say(f"verify {name} --source {SOURCE}")
            verification = verify_checkpoint(folder / name, source=SOURCE)
            nbytes = sum(t.nbytes for s in program.shards for t in s.tensors)
            row = DemoRow(name, experts, program.top_k, program.parameters, nbytes, verification.ok)
            rows.append(_run(row, folder / name, say) if runs else row)
    return rows


def demo_texts() -> dict[str, str]:
    """Generated arithmetic, code of Python's standard library, and a few sentences."""
    import textwrap

    return {
        "arithmetic": arithmetic(random.Random(0), TEXT_CHARACTERS),
        "code": Path(textwrap.__file__).read_text()[:TEXT_CHARACTERS],
        "prose": PROSE,
    }


def profile_texts() -> dict[str, str]:
    """Texts of the first two kinds to choose experts by, other than those of `demo_texts`."""
    import shlex

    return {
        "arithmetic": arithmetic(random.Random(1), 4 * TEXT_CHARACTERS),
        "code": Path(shlex.__file__).read_text()[: 4 * TEXT_CHARACTERS],
    }


def arithmetic(rng: random.Random, characters: int) -> str:
    """Small sums with their answers, at least `characters` long."""
    lines = ""
    while len(lines) < characters:
        a, b = rng.randint(2, 99), rng.randint(2, 99)
        sign, result = rng.choice((("+", a + b), ("-", a - b), ("*", a * b)))
        lines += f"Question: What is {a} {sign} {b}?\nAnswer: {a} {sign} {b} = {result}.\n"
    return lines


def _ranking(folder: Path, say: Callable[[str], None]) -> Ranking:
    """Experts of the bundled model ranked on `profile_texts`."""
    from moe_surgery.quality.corpus import text_files
    from moe_surgery.quality.job import profile
    from moe_surgery.selection.rank import rank

    paths = []
    for name, text in profile_texts().items():
        paths.append(folder / f"{name}.txt")
        paths[-1].write_text(text)
    say(f"profile {SOURCE} --texts arithmetic.txt --texts code.txt -o tiny.stats")
    profiled = profile(SOURCE, text_files(paths), folder / "tiny.stats")
    say(f"rank tiny.stats --metric {METRIC}")
    return rank(profiled.statistics, METRIC)


def _run(row: DemoRow, path: str | Path, say: Callable[[str], None]) -> DemoRow:
    """`row` with tokens per second, losses and a sample of the model in `path`."""
    from dataclasses import replace

    import torch

    from moe_surgery.quality.loss import cross_entropy
    from moe_surgery.runtime.generate import generate
    from moe_surgery.runtime.load import load_model
    from moe_surgery.runtime.text import Text
    from moe_surgery.runtime.usage import Stopwatch

    torch.set_num_threads(1)  # more only slow down so small a model
    say(f"generate {row.name} --prompt {PROMPT!r}")
    model, text, watch = load_model(path), Text(path), Stopwatch()
    generated = generate(
        model,
        [text.encode(PROMPT)],
        max_new_tokens=NEW_TOKENS,
        stop_tokens=(),
        callback=lambda _: watch.step(),
    )
    losses = {name: cross_entropy(model, text.encode(t)) for name, t in demo_texts().items()}
    sample = text.decode(generated.tokens[0]).split("\n")[0].strip()
    return replace(row, tokens_per_second=watch.decode_rate(), losses=losses, sample=sample)
