"""One side of `beside_llama_cpp.py` and `beside_peers.py`, in a separate process: our runtime, llama.cpp or
ik_llama.cpp, driven line by line.

    python -m benchmarks.decode_sides ours|llama.cpp|ik_llama.cpp|control|bandwidth [CHECKPOINT GGUF]
        --threads N --logits FILE [--dense q8_0] [--isa avx512vnni]

`--dense` and `--isa` are ours: dense weights in 8 bits, and an instruction set that is not the best here.
`control` and `bandwidth` answer with one line and end: the logits of ours in BF16, and how fast memory is read.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.families import identify_model
from moe_surgery.families.model_config import ModelConfig

SIDES = ("ours", "llama.cpp")
LIBRARIES = {"llama.cpp": "llama_cpp", "ik_llama.cpp": "ik_llama_cpp._ctypes_api"}
PROMPT, PREFILL, BATCHES, CONTEXT = 16, 512, (1, 8), 256
LONGEST = 2048  # prompt
MEMORY = {"private_mib": "RssAnon", "mapped_mib": "RssFile", "peak_rss_mib": "VmHWM"}
READ_BYTES, READ_PASSES = 1 << 30, 5


def status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def prompts(vocabulary: int, batch: int, length: int) -> np.ndarray:
    """Tokens int64 [batch, length]; the first row of every batch is the same."""
    return np.random.default_rng(length).integers(0, vocabulary, (batch, length))


class Ours:
    def __init__(
        self, checkpoint: str, threads: int, dtype: str | None = None, dense: str = "keep", isa: str = ""
    ) -> None:
        import torch

        from moe_surgery.kernels.native import NativeBackend
        from moe_surgery.runtime.load import load_model

        torch.set_num_threads(threads)
        self._torch = torch
        dtype_of = None if dtype is None else getattr(torch, dtype)
        self._model = load_model(checkpoint, dtype=dtype_of, dense=dense)
        if isa:
            self._model.backend = NativeBackend(isa)
        backend = self._model.backend
        kernels = f"{backend.name} ({backend.isa})" if isinstance(backend, NativeBackend) else backend.name
        self.name = f"{kernels}, {self._model.dtype}{', dense weights in Q8_0' if dense == 'q8_0' else ''}"

    def begin(self, batch: int, context: int) -> None:
        self._cache = self._model.new_cache(batch, context)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Logits [batch, vocabulary] behind the last column of tokens [batch, n]."""
        ids = self._torch.from_numpy(np.ascontiguousarray(tokens))
        logits: np.ndarray = self._model(ids, self._cache, logits_to_keep=1)[:, -1].float().numpy()
        return logits


class Llama:
    """llama.cpp, or a fork of it, through its C interface: as many sequences as the largest batch."""

    def __init__(self, library: str, gguf: str, threads: int) -> None:
        api: Any = import_module(library)
        self._api = api
        self._model = api.llama_model_load_from_file(gguf.encode(), api.llama_model_default_params())
        options = api.llama_context_default_params()
        options.n_ctx = max(LONGEST + 32, max(BATCHES) * 256)
        options.n_batch = options.n_ubatch = PREFILL
        options.n_seq_max = max(BATCHES)
        if library == "llama_cpp":
            options.kv_unified = True  # the fork knows nothing else
        options.n_threads = options.n_threads_batch = threads
        self._context = api.llama_init_from_model(self._model, options)
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._batch = api.llama_batch_init(PREFILL, 0, 1)
        package = "llama-cpp-python" if library == "llama_cpp" else "ik-llama-cpp-python"
        self.name = f"{package} {version(package)}"

    def begin(self, batch: int, context: int) -> None:
        if hasattr(self._api, "llama_memory_clear"):
            self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        else:
            self._api.llama_kv_cache_clear(self._context)
        self._position = 0

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """As `Ours.step`; one sequence may be longer than a batch of the library."""
        for start in range(0, tokens.shape[1], PREFILL):
            logits = self._step(tokens[:, start : start + PREFILL])
        return logits

    def _step(self, tokens: np.ndarray) -> np.ndarray:
        batch, (sequences, length) = self._batch, tokens.shape
        batch.n_tokens = tokens.size
        for number, (sequence, place) in enumerate(np.ndindex(sequences, length)):
            batch.token[number] = int(tokens[sequence, place])
            batch.pos[number] = self._position + place
            batch.n_seq_id[number] = 1
            batch.seq_id[number][0] = sequence
            batch.logits[number] = place == length - 1
        if self._api.llama_decode(self._context, batch):
            raise click.ClickException("llama_decode failed")
        self._position += length
        rows = [
            np.ctypeslib.as_array(
                self._api.llama_get_logits_ith(self._context, (s + 1) * length - 1), (self._vocabulary,)
            )
            for s in range(sequences)
        ]
        return np.stack(rows)


def serve(
    side: str, checkpoint: str, gguf: str, threads: int, logits: str, dense: str = "keep", isa: str = ""
) -> None:
    """One side in this process: load, then do what each line of the input says, one line of JSON for each.

    The libraries are imported before the clock starts: what is timed is the model. The logits of the
    prompts go to the file `logits`.
    """
    import_module("moe_surgery.runtime.load" if side == "ours" else LIBRARIES[side])
    vocabulary, kept = vocabulary_of(checkpoint), []
    start = time.perf_counter()
    if side == "ours":
        runner: Ours | Llama = Ours(checkpoint, threads, dense=dense, isa=isa)
    else:
        runner = Llama(LIBRARIES[side], gguf, threads)
    print(json.dumps({"load_s": time.perf_counter() - start, "name": runner.name}), flush=True)
    last = np.zeros((1, 1))
    for line in sys.stdin:
        what, number = line.split()
        begin = time.perf_counter()
        if what == "prompt":  # as a batch of that many
            runner.begin(int(number), CONTEXT)
            last = runner.step(prompts(vocabulary, int(number), PROMPT))
            kept.append(last)
        elif what == "steps":
            for _ in range(int(number)):
                last = runner.step(last.argmax(-1)[:, None])
        elif what == "prefill":
            runner.begin(1, int(number) + 1)
            runner.step(prompts(vocabulary, 1, int(number)))
        seconds = time.perf_counter() - begin
        output = {name: status_mib(key) for name, key in MEMORY.items()}
        print(json.dumps({"seconds": seconds, **output}), flush=True)
    np.save(logits, np.concatenate(kept))


def run_control(checkpoint: str, threads: int, logits: str) -> dict:
    """Ours in BF16: the logits of the prompts go to the file `logits`."""
    runner, kept = Ours(checkpoint, threads, "bfloat16"), []
    for batch in BATCHES:
        runner.begin(batch, PROMPT + 1)
        kept.append(runner.step(prompts(vocabulary_of(checkpoint), batch, PROMPT)))
    np.save(logits, np.concatenate(kept))
    return {}


def vocabulary_of(checkpoint: str) -> int:
    with Checkpoint.open(checkpoint) as opened:
        return ModelConfig.of(identify_model(opened)).vocab_size


def read_bandwidth(threads: int) -> float:
    """Bytes a second that `threads` threads read from memory, each its own block, by libc's memchr."""
    library = ctypes.CDLL(None)
    library.memchr.restype = ctypes.c_void_p
    library.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    share = READ_BYTES // threads
    blocks = [np.full(share, 1, np.uint8) for _ in range(threads)]

    def search(block: np.ndarray) -> None:
        assert library.memchr(block.ctypes.data, 0, share) is None

    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(READ_PASSES):
            begin = time.perf_counter()
            list(pool.map(search, blocks))
            best = max(best, share * threads / (time.perf_counter() - begin))
    return best


@click.command(help=__doc__)
@click.argument("side", type=click.Choice(["ours", *LIBRARIES, "control", "bandwidth"]))
@click.argument("files", nargs=-1)
@click.option("--threads", type=int, required=True)
@click.option("--logits", default="")
@click.option("--dense", default="keep")
@click.option("--isa", default="")
def main(side: str, files: tuple[str, ...], threads: int, logits: str, dense: str, isa: str) -> None:
    if side == "bandwidth":
        click.echo(json.dumps({"bytes_per_s": read_bandwidth(threads)}))
    elif side == "control":
        click.echo(json.dumps(run_control(files[0], threads, logits)))
    else:
        serve(side, files[0], files[1], threads, logits, dense, isa)


if __name__ == "__main__":
    main()
