"""GGUF files read by the gguf package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

gguf = pytest.importorskip("gguf", reason="the gguf package reads what export wrote")


@dataclass(frozen=True)
class Read:
    """A GGUF file: metadata values by key, and per tensor its type's name, shape (slowest dimension
    first), file offset and bytes."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, tuple[str, tuple[int, ...], int, bytes]]

    def values(self, name: str) -> np.ndarray:
        """The tensor as float32, dequantised by the gguf package."""
        kind, shape, _, raw = self.tensors[name]
        number = gguf.GGMLQuantizationType[kind]
        block, nbytes = gguf.GGML_QUANT_SIZES[number]
        if kind in ("F32", "F16"):
            data = np.frombuffer(raw, {"F32": np.float32, "F16": np.float16}[kind]).reshape(shape)
        else:
            data = np.frombuffer(raw, np.uint8).reshape(*shape[:-1], shape[-1] // block * nbytes)
        return gguf.quants.dequantize(data, number).reshape(shape)


def read(path: Path) -> Read:
    reader = gguf.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {
        t.name: (t.tensor_type.name, tuple(map(int, reversed(t.shape))), t.data_offset, bytes(t.data))
        for t in reader.tensors
    }
    assert len(tensors) == len(reader.tensors)
    return Read(path, metadata, tensors)


def digest(file: Read) -> str:
    """xxh3_128 over name, type, shape and bytes of every tensor, by name."""
    state = xxhash.xxh3_128()
    for name, (kind, shape, _, content) in sorted(file.tensors.items()):
        state.update(f"{name} {kind} {list(shape)}\n".encode())
        state.update(content)
    return state.hexdigest()
