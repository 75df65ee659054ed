"""Runs the kernels' tests in Triton's interpreter, each file in a process of its own.

The interpreter checks values, not rounding to BF16, BF16 products, concurrency or alignment: those need
a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.interpreted import needs_interpreter, run_interpreted

FILES = sorted(Path(__file__).parent.glob("interpreted_*.py"))
pytestmark = [*needs_interpreter, pytest.mark.interpreter]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_interpreted(file: Path) -> None:
    run_interpreted(file)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_interpreted_full_grid(file: Path) -> None:
    run_interpreted(file, "slow")
