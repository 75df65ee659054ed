"""llama.cpp in a process of its own, since it aborts the process where an assertion fails."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

__all__ = ["MISSING", "Llama", "LlamaError", "Run"]

ROOT = Path(__file__).parents[2]
MISSING = (
    None
    if importlib.util.find_spec("llama_cpp")
    else 'llama-cpp-python is not installed: CMAKE_ARGS="-DGGML_NATIVE=OFF" pip install llama-cpp-python'
)
"""Why tests with llama.cpp skip; None where they run."""


class LlamaError(Exception):
    """llama.cpp refused a file, or died; with what it said."""


@dataclass(frozen=True)
class Run:
    """`logits` float32 [tokens, vocabulary]. `squares` and `counts` by weight, where an importance matrix was asked."""

    logits: np.ndarray
    squares: Mapping[str, np.ndarray]
    counts: Mapping[str, np.ndarray]


class Llama:
    """A process that runs GGUF files, started again after a crash. Close it, or use it as a context."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "log"

    def run(
        self,
        model: Path,
        tokens: Sequence[int],
        *,
        kept: Mapping[int, Sequence[int]] | None = None,
        imatrix: bool = False,
    ) -> Run:
        """`model` on `tokens`, as one batch. `kept` by block: in these the others' scores are -inf in the graph.

        Raises LlamaError.
        """
        out = Path(self._folder.name) / "result.npz"
        job = {
            "model": str(model),
            "tokens": [int(token) for token in tokens],
            "kept": {int(block): [int(e) for e in experts] for block, experts in (kept or {}).items()},
            "imatrix": imatrix,
            "out": str(out),
        }
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        reply = process.stdout.readline()
        if not reply:
            self._stop()
            raise LlamaError(f"{model.name}: llama.cpp died ({process.returncode}): {self._tail()}")
        if "error" in (answer := json.loads(reply)):
            raise LlamaError(f"{model.name}: {answer['error']}")
        with np.load(out) as arrays:
            by_kind = {
                kind: {name.partition(" ")[2]: arrays[name] for name in arrays if name.startswith(f"{kind} ")}
                for kind in ("squares", "counts")
            }
            return Run(arrays["logits"], **by_kind)

    def _start(self) -> subprocess.Popen[str]:
        with self._log.open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.support.llama_worker"],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "GGML_NO_BACKTRACE": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def _tail(self) -> str:
        return " ".join(self._log.read_text(errors="replace").splitlines()[-6:])

    def _stop(self) -> None:
        if self._process is not None:
            with self._process as process:
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
            self._process = None

    def close(self) -> None:
        self._stop()
        self._folder.cleanup()

    def __enter__(self) -> Llama:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
