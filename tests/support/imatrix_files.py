"""Importance matrices as llama-imatrix writes them, from sums that the tests have taken themselves.

The forms: `IMatrixCollector::save_imatrix` and `save_imatrix_legacy` of tools/imatrix/imatrix.cpp, ggml-org/llama.cpp
(0c1e570).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

__all__ = ["write_imatrix", "write_legacy_imatrix"]

Arrays = Mapping[str, np.ndarray]


def write_imatrix(
    path: Path, squares: Arrays, counts: Arrays, *, chunk_size: int = 512, dataset: str = "text"
) -> None:
    """`squares` [E, inputs] and `counts` [E] by weight, E = 1 for dense weights, as GGUF."""
    writer = GGUFWriter(path, "")
    writer.kv_data[0].clear()  # such a file has no general.architecture
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", max(int(c.max()) for c in counts.values()) // chunk_size)
    writer.add_uint32("imatrix.chunk_size", chunk_size)
    for name in sorted(squares):
        writer.add_tensor(f"{name}.in_sum2", squares[name].astype(np.float32))
        writer.add_tensor(f"{name}.counts", counts[name].astype(np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_legacy_imatrix(
    path: Path, squares: Arrays, counts: Arrays, *, chunk_size: int = 512, dataset: str = "text"
) -> None:
    """The same as a `.dat`: means times a number of calls, 1 for experts that no token chose; weights without any
    rows are left out."""
    stored = [name for name in sorted(squares) if counts[name].any()]
    parts = [struct.pack("<i", len(stored))]
    for name in stored:
        rows = counts[name].astype(np.float32)[:, None]
        calls = -(-int(rows.max()) // chunk_size)
        sums = np.where(rows > 0, squares[name].astype(np.float32), np.float32(1))
        values = sums / np.maximum(rows, 1) * np.float32(calls)
        text = name.encode()
        parts += [
            struct.pack("<i", len(text)),
            text,
            struct.pack("<ii", calls, values.size),
            values.astype("<f4").tobytes(),
        ]
    text = dataset.encode()
    chunks = max(int(c.max()) for c in counts.values()) // chunk_size
    parts.append(struct.pack("<ii", chunks, len(text)) + text)
    path.write_bytes(b"".join(parts))
