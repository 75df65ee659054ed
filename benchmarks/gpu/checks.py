"""The tests on the device: pytest over the files that run there, then compute-sanitizer where there is one."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["FILES", "sanitize", "test"]

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "kernels" / "triton_decode"
FILES = tuple(sorted([*FOLDER.glob("device_*.py"), *FOLDER.glob("gpu_*.py")]))
# A memory checker makes kernels some ten times slower: a few of every kind.
SANITIZED = "residual_norm or test_output or test_attention or test_experts_of_both_ways"
# The suite's own settings want plug-ins that a GPU machine need not have.
OPTIONS = ("-q", "--noconftest", "-p", "no:cacheprovider", "-o", "addopts=")


def test(timeout: float) -> str:
    """ "passed", or what went wrong in a line; the output of pytest goes to stderr."""
    if importlib.util.find_spec("pytest") is None:
        return "not run: pytest is not installed"
    # Most of the time goes to compiling kernels, which several processes do at once where they can.
    spread = ["-n", "6"] if importlib.util.find_spec("xdist") and (os.cpu_count() or 1) >= 8 else []
    return _run([sys.executable, "-m", "pytest", *OPTIONS, *spread, *map(str, FILES)], timeout)


def sanitize(timeout: float, tool: str = "memcheck") -> str:
    """As `test`, for some of the tests under compute-sanitizer's `tool`."""
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if program is None:
        return "not run: compute-sanitizer is not installed"
    if importlib.util.find_spec("pytest") is None:
        return "not run: pytest is not installed"
    pytest = [sys.executable, "-m", "pytest", *OPTIONS, "-x", "-k", SANITIZED, *map(str, FILES)]
    command = [program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", *pytest]
    # The caching allocator would hide accesses past the end of a tensor.
    return _run(command, timeout, PYTORCH_NO_CUDA_MEMORY_CACHING="1", MOE_SURGERY_FEW_TESTS="1")


def _run(command: list[str], timeout: float, **environment: str) -> str:
    result = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    result |= {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), result.get("PYTHONPATH")))),
        **environment,
    }
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=result, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"failed: not done after {timeout:.0f} s"
    print(done.stdout[-20000:], file=sys.stderr)
    if "Device not supported" in done.stdout:  # what compute-sanitizer says under some virtual machines
        return "not run: compute-sanitizer does not support this device"
    lines = [line.strip("= ") for line in done.stdout.splitlines() if line.strip("= ")]
    # compute-sanitizer's own summary comes after that of pytest.
    summary = [line for line in lines if " passed" in line or " failed" in line or " skipped" in line]
    last = " ".join(
        (summary[-1:] or lines[-1:]) + [line for line in lines if line.startswith("ERROR SUMMARY")]
    )
    if done.returncode:
        return f"failed: exit {done.returncode}: {last[:200]}"
    return last if " passed" in last else f"failed: nothing ran: {last[:200]}"
