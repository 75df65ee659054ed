"""Runs GGUF files in llama.cpp on behalf of `llama_process`, which starts this as a program of its own.

A line of JSON in is a job, a line out says how it went; arrays go through a file. The graph callback of
llama.cpp sees every tensor it asks for right after it was computed, and may change it.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp._ggml import libggml

MASKED = ("ffn_moe_logits", "ffn_moe_logits_biased", "ffn_moe_probs_biased")
"""The scores of experts on their way to the selection; not every architecture has all."""

_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_WARNING = 3
_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class Tensor(ctypes.Structure):
    """struct ggml_tensor of ggml.h, up to its name."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


def name_of(tensor: Tensor) -> str:
    return tensor.name.decode(errors="replace")


def array(tensor: Tensor, dtype: Any) -> np.ndarray:
    """The tensor's memory as an array, dimensions slowest first; writing to it writes to the graph."""
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    size = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + np.dtype(dtype).itemsize
    memory = (ctypes.c_char * size).from_address(tensor.data)
    return np.ndarray(shape, dtype, memory, strides=strides)


@dataclass
class Sums:
    """What llama-imatrix adds up for a weight: squares of its inputs, and rows, by expert (one if dense)."""

    squares: np.ndarray  # float64 [E, inputs]
    counts: np.ndarray  # int64 [E]


@dataclass
class Watch:
    """The graph callback: masks experts, and adds up what an importance matrix holds."""

    kept: Mapping[int, Sequence[int]]
    imatrix: bool
    sums: dict[str, Sums] = field(default_factory=dict)
    masked: set[int] = field(default_factory=set)
    failure: BaseException | None = None

    def __call__(self, pointer: int, ask: bool, _data: object) -> bool:
        try:
            tensor = Tensor.from_address(pointer)
            interesting = self.wants(tensor)
            if interesting and not ask:
                self.see(tensor)
            return interesting if ask else True
        except BaseException as error:
            self.failure = error
            return False

    def wants(self, tensor: Tensor) -> bool:
        return self.layer_to_mask(tensor) is not None or (
            self.imatrix and op_name(tensor).startswith("MUL_MAT")
        )

    def layer_to_mask(self, tensor: Tensor) -> int | None:
        if not self.kept:
            return None
        stem, _, layer = name_of(tensor).rpartition("-")
        return int(layer) if stem in MASKED and layer.isdigit() and int(layer) in self.kept else None

    def see(self, tensor: Tensor) -> None:
        layer = self.layer_to_mask(tensor)
        if layer is not None:
            scores = array(tensor, np.float32)
            dropped = np.setdiff1d(np.arange(scores.shape[-1]), self.kept[layer])
            scores[..., dropped] = -np.inf
            self.masked.add(layer)
        elif op_name(tensor) == "MUL_MAT_ID":
            self.add_chosen(tensor)
        else:
            self.add_dense(tensor)

    def add_chosen(self, tensor: Tensor) -> None:
        weight, inputs, chosen = (tensor.src[i].contents for i in range(3))
        x = array(inputs, np.float32)[0].astype(np.float64) ** 2  # [tokens, k or 1, inputs]
        ids = array(chosen, np.int32)[0, 0]  # [tokens, k]
        sums = self.sums.setdefault(
            name_of(weight), Sums(np.zeros((weight.ne[2], x.shape[-1])), np.zeros(weight.ne[2], np.int64))
        )
        for slot in range(ids.shape[1]):
            np.add.at(sums.squares, ids[:, slot], x[:, slot % x.shape[1]])
            np.add.at(sums.counts, ids[:, slot], 1)

    def add_dense(self, tensor: Tensor) -> None:
        weight, inputs = tensor.src[0].contents, tensor.src[1].contents
        if inputs.type != 0 or inputs.ne[1] < 16 or not re.match(r"blk\.", name_of(weight)):
            return  # as llama-imatrix
        x = array(inputs, np.float32).astype(np.float64) ** 2
        if weight.ne[2] * weight.ne[3] == 1:
            sums = self.sums.setdefault(
                name_of(weight), Sums(np.zeros((1, x.shape[-1])), np.zeros(1, np.int64))
            )
            sums.squares[0] += x.reshape(-1, x.shape[-1]).sum(0)
            sums.counts[0] += x.size // x.shape[-1]


def op_name(tensor: Tensor) -> str:
    return str(libggml.ggml_op_name(tensor.op).decode())


class Job:
    """A file loaded, run on the tokens as one batch, closed."""

    def __init__(self, job: Mapping[str, Any], errors: list[str]) -> None:
        self.job, self.errors = job, errors
        self.watch = Watch({int(n): ids for n, ids in job["kept"].items()}, job["imatrix"])

    def run(self) -> np.ndarray:
        parameters = llama_cpp.llama_model_default_params()
        parameters.use_extra_bufts = False  # repacked weights and AMX compute other roundings, or crash
        model = llama_cpp.llama_model_load_from_file(os.fsencode(self.job["model"]), parameters)
        if not model:
            raise RuntimeError(" ".join(self.errors) or "not loaded")
        try:
            return self.logits(model)
        finally:
            llama_cpp.llama_model_free(model)

    def logits(self, model: Any) -> np.ndarray:
        tokens = self.job["tokens"]
        callback = llama_cpp.llama_cpp.ggml_backend_sched_eval_callback(self.watch)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = max(len(tokens), 16)
        parameters.type_k = parameters.type_v = 0  # float32
        parameters.n_threads = parameters.n_threads_batch = 1
        if self.watch.kept or self.watch.imatrix:
            parameters.cb_eval = callback
        context = llama_cpp.llama_init_from_model(model, parameters)
        if not context:
            raise RuntimeError(" ".join(self.errors) or "no context")
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for position, token in enumerate(tokens):
                batch.token[position], batch.pos[position] = token, position
                batch.n_seq_id[position], batch.seq_id[position][0], batch.logits[position] = 1, 0, 1
            status = llama_cpp.llama_decode(context, batch)
            if self.watch.failure is not None:
                raise self.watch.failure
            if status != 0:
                raise RuntimeError(f"llama_decode returned {status}; " + " ".join(self.errors))
            if self.watch.masked != set(self.watch.kept):
                raise RuntimeError(
                    f"masked layers {sorted(self.watch.masked)}, not {sorted(self.watch.kept)}"
                )
            vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
            values = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(tokens), vocabulary))
            return values.copy()
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that llama.cpp prints may land among the replies
    libggml.ggml_op_name.argtypes, libggml.ggml_op_name.restype = [ctypes.c_int], ctypes.c_char_p
    errors: list[str] = []

    def note(level: int, text: bytes, _data: object) -> None:
        if level in (_WARNING, _ERROR):
            errors.append(text.decode(errors="replace").strip())

    logger = _LOG_CALLBACK(note)
    llama_cpp.llama_log_set(logger, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    for line in sys.stdin:
        job = json.loads(line)
        errors.clear()
        reply: dict[str, Any] = {}
        try:
            running = Job(job, errors)
            arrays = {"logits": running.run()}
            for name, sums in running.watch.sums.items():
                arrays[f"squares {name}"], arrays[f"counts {name}"] = sums.squares, sums.counts
            np.savez(job["out"], **arrays)
        except Exception as error:
            reply["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
