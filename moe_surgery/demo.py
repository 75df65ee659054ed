"""The main job on the embedded checkpoint, as a newcomer's first look and a smoke test."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from moe_surgery.errors import OutputError
from moe_surgery.pipeline import inspect, prune
from moe_surgery.selection.plan import plan_random
from moe_surgery.surgery.verify import verify_checkpoint

__all__ = ["DemoRow", "run_demo"]

SOURCE = "example:tiny"
JOBS = ((4, "mxfp4"), (8, "mxfp4"), (16, "mxfp4"), (8, "bf16"))


@dataclass(frozen=True, slots=True)
class DemoRow:
    """One model of the demo's table."""

    name: str
    experts: int
    top_k: int
    parameters: int
    nbytes: int
    verified: bool


def run_demo(output: Path | None, say: Callable[[str], None]) -> list[DemoRow]:
    """Prune the embedded checkpoint to several sizes, verify each against its source.

    Models go to the new folder `output`, or to a temporary one that is removed. `say` is told each
    step. The first row is the full model. Raises OutputError where `output` exists.
    """
    full = inspect(SOURCE)
    rows = [DemoRow("full", full.experts, full.top_k, full.parameters, full.nbytes, True)]
    with ExitStack() as stack:
        folder = output or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if output is not None:
            try:
                output.mkdir()
            except OSError as error:
                raise OutputError(f"{output}: cannot create: {error.strerror}") from error
        for experts, dtype in JOBS:
            name = f"tiny-{experts}-{dtype}"
            say(f"prune {SOURCE} {name}: {experts} of {full.experts} experts, {dtype}")
            result = prune(SOURCE, folder / name, plan_random(experts, 0, full), dtype=dtype)
            say(f"verify {name} --source {SOURCE}")
            found = verify_checkpoint(folder / name, source=SOURCE)
            program = result.program
            nbytes = sum(t.nbytes for s in program.shards for t in s.tensors)
            rows.append(DemoRow(name, experts, program.top_k, program.parameters, nbytes, found.ok))
    return rows
