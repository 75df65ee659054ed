"""Cuts experts out of a GGUF file by brute force: numpy indexing, and the gguf package on both sides.

The yardstick for `prune`. It knows nothing of our own reader, naming rules or type table: a tensor of a block
has an expert axis where its name contains one of a few words, and then it is the first one of numpy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFWriter, dequantize

__all__ = ["brute_force_slices", "slice_gguf", "write_as_float32"]

_EXPERTS = re.compile(
    r"blk\.(\d+)\.(ffn_(gate|up|down|gate_up)_exps\.\w+|ffn_gate_inp\.(weight|bias)|exp_probs_b(\.bias)?)"
)


def brute_force_slices(source: Path, kept: Mapping[int, Sequence[int]]) -> dict[str, np.ndarray]:
    """The bytes of every tensor, uint8 [n]; of those that count experts in the blocks of `kept` only these experts."""
    result = {}
    for tensor in GGUFReader(source).tensors:
        data = np.ascontiguousarray(tensor.data)
        match = _EXPERTS.fullmatch(tensor.name)
        if match and int(match[1]) in kept:
            data = data[list(kept[int(match[1])])]
        result[tensor.name] = (
            np.atleast_1d(data).view(np.uint8).reshape(-1, data[..., :].shape[-1] * data.itemsize)
        )
    return result


def slice_gguf(source: Path, target: Path, kept: Mapping[int, Sequence[int]]) -> None:
    """Write a file that llama.cpp loads: `brute_force_slices`, and the counts of the metadata."""
    reader = GGUFReader(source)
    count = len(next(iter(kept.values())))
    writer = _like(reader, target, count)
    slices = brute_force_slices(source, kept)
    for tensor in reader.tensors:
        shape = [int(n) for n in tensor.shape[::-1]]
        match = _EXPERTS.fullmatch(tensor.name)
        if match and int(match[1]) in kept:
            shape[0] = count
        data = slices[tensor.name].view(np.int8)
        writer.add_tensor(tensor.name, data, raw_shape=shape, raw_dtype=tensor.tensor_type)
    _write(writer)


def write_as_float32(source: Path, target: Path) -> None:
    """Write the same model with every weight as float32, in which llama.cpp rounds no activations."""
    reader = GGUFReader(source)
    writer = _like(reader, target)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    _write(writer)


def _like(reader: GGUFReader, target: Path, experts: int | None = None) -> GGUFWriter:
    """A writer with the metadata of `reader`, with other counts for so many experts."""
    architecture = str(reader.fields["general.architecture"].contents())
    writer = GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = field.contents()
        if experts and name == f"{architecture}.expert_count":
            value = experts
        elif experts and name == f"{architecture}.expert_used_count":
            value = min(value, experts)
        writer.add_key_value(
            name, value, field.types[0], sub_type=field.types[-1] if len(field.types) > 1 else None
        )
    return writer


def _write(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
