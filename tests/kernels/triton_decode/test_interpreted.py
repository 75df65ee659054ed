"""The decode step's kernels where there is no GPU: run in Triton's interpreter, a process each file.

Their compilation for absent GPUs is tested with that of all kernels, in tests/kernels/triton/.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.interpreted import needs_interpreter, run_interpreted

FILES = sorted(Path(__file__).parent.glob("device_*.py"))
pytestmark = [*needs_interpreter, pytest.mark.interpreter]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_numerics_in_the_interpreter(file: Path) -> None:
    run_interpreted(file)
