"""The decode step's kernels where there is no GPU: run in Triton's interpreter, and compiled for absent ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.kernels.decode_entries import decode_entries
from benchmarks.kernels.entries import DEVICES

HERE = Path(__file__).parent
# A process each, so that they can run beside one another.
FILES = sorted(p.name for p in HERE.glob("device_*.py"))
# A card with the least shared memory and the compiler's two ways: up to Hopper, and Blackwell.
ARCHITECTURES = (86, 90, 120)


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


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_within_every_limit(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token and eight; `python -m benchmarks.kernels.aot` compiles every width for every architecture."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from benchmarks.kernels.aot import problems, usage

    wanted = {"qkv full 1", "attention ring 1", "unembed 1", "norm added 8", "output 8"}
    named = {name: launch for name, launch in decode_entries(DEVICES[arch][0], (1, 8)) if name in wanted}
    assert set(named) == wanted
    assert not [line for name, launch in named.items() for line in problems(name, arch, usage(launch, arch))]
