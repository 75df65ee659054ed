"""Runs the kernels' tests in Triton's interpreter, which an environment variable switches on at import.

Each file in a process of its own; what it says is printed where it fails. The interpreter checks values,
not rounding to BF16, BF16 products, concurrency or alignment: those need a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
FILES = sorted(path.name for path in HERE.glob("interpreted_*.py"))
pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed"),
    pytest.mark.skipif(
        tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4),
        reason="Triton's interpreter cannot loop to a run-time bound with numpy 2.4",
    ),
]


def run(file: str, selection: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", selection, str(HERE / file)]
    result = subprocess.run(command, env=environment, cwd=HERE.parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


@pytest.mark.parametrize("file", FILES)
def test_interpreted(file: str) -> None:
    run(file, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_interpreted_full_grid(file: str) -> None:
    run(file, "slow")
