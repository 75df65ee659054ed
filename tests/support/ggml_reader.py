"""llama.cpp's own reader of GGUF headers as an oracle: `gguf_init_from_file` of its shared library.

Its assertions abort the process, so it runs in another one, which is started again when it dies. The library is
the one inside llama-cpp-python, or the file that MOE_SURGERY_GGML names.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

CHILD = """
import ctypes, sys
ggml = ctypes.CDLL(sys.argv[1])
class Params(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p))]
ggml.gguf_init_from_file.restype = ctypes.c_void_p
ggml.gguf_init_from_file.argtypes = [ctypes.c_char_p, Params]
ggml.gguf_free.argtypes = ggml.ggml_free.argtypes = [ctypes.c_void_p]
for line in sys.stdin.buffer:
    tensors = ctypes.c_void_p()
    file = ggml.gguf_init_from_file(line.rstrip(b"\\n"), Params(True, ctypes.pointer(tensors)))
    if file:
        ggml.gguf_free(file)
        ggml.ggml_free(tensors)
    print("yes" if file else "no", flush=True)
"""


def ggml_library() -> Path | None:
    """The shared library with llama.cpp's reader, None where there is none."""
    if named := os.environ.get("MOE_SURGERY_GGML"):
        return Path(named)
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    found = sorted((Path(spec.origin).parent / "lib").glob("libggml-base.*"))
    return found[0] if found else None


class GgmlReader:
    """Asks whether llama.cpp reads the header of a file. Close it, or use it as a context manager."""

    def __init__(self, library: Path) -> None:
        self._library = library
        self._child: subprocess.Popen[bytes] | None = None
        self.aborts = 0

    def accepts(self, path: Path) -> bool:
        """False too where it aborts or crashes; `aborts` counts these."""
        child = self._child = self._child or subprocess.Popen(
            [sys.executable, "-c", CHILD, self._library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # which a debugger writes among the answers
        )
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(os.fsencode(path) + b"\n")
        child.stdin.flush()
        answer = child.stdout.readline().strip()
        if not answer:
            self.aborts += 1
            self.close()
        return answer == b"yes"

    def close(self) -> None:
        if self._child is not None:
            self._child.communicate()
            self._child = None

    def __enter__(self) -> GgmlReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
