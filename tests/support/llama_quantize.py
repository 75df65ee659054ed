"""llama-quantize with a matrix, by llama.cpp's library: python -m tests.support.llama_quantize IN OUT MATRIX ...

To Q2_K_S, which needs a matrix for most tensors and takes little time. Prints llama.cpp's result for each three
files, 0 where it succeeded.
"""

from __future__ import annotations

import ctypes
import sys

import gguf
import llama_cpp
import numpy as np

Q2_K_S = 21


def quantised(source: str, out: str, matrix: str) -> int:
    tensors = {t.name: t.data for t in gguf.GGUFReader(matrix).tensors}
    kept = []
    for name in [n.removesuffix(".in_sum2") for n in tensors if n.endswith(".in_sum2")]:
        counts = np.maximum(tensors[f"{name}.counts"].reshape(-1, 1), 1)
        sums = tensors[f"{name}.in_sum2"].reshape(len(counts), -1)
        kept.append((name.encode(), np.ascontiguousarray(sums / counts, np.float32)))
    entries = (llama_cpp.llama_model_imatrix_data * (len(kept) + 1))()
    for entry, (name, values) in zip(entries, kept, strict=False):
        entry.name, entry.size = name, values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = Q2_K_S, 1
    params.imatrix = entries
    return int(llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params)))


if __name__ == "__main__":
    files = iter(sys.argv[1:])
    for source, out, matrix in zip(files, files, files, strict=True):
        print(quantised(source, out, matrix))
