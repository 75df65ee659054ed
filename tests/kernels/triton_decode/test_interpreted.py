"""The decode step's kernels where there is no GPU: run in Triton's interpreter.

Their compilation for absent ones is tested with that of all kernels, in tests/kernels/triton/.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton is not installed")

HERE = Path(__file__).parent
# A process each, so that they can run beside one another.
FILES = sorted(p.name for p in HERE.glob("device_*.py"))


@pytest.mark.parametrize("file", FILES)
def test_numerics_in_the_interpreter(file: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    # Options of the outer run (workers, plugins) are not for the inner one.
    environment.pop("PYTEST_ADDOPTS", None)
    quiet = ["-q", "-p", "no:cacheprovider", "-W", "ignore::DeprecationWarning"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *quiet, HERE / file],
        cwd=HERE.parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
