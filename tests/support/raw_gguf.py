"""GGUF files written and read with struct alone, for types that the gguf package does not know; and tiny MoE models.

Weights are random bytes: for tests that compare bytes.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import NamedTuple

CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
NUMBERS = {"u8": 0, "u16": 2, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "str": 8, "u64": 10}

# Number: values of a block, its bytes, bytes before a row. From ggml.h of llama.cpp and ik_llama.cpp.
TYPES = {
    "F32": (0, 1, 4, 0),
    "F16": (1, 1, 2, 0),
    "Q4_0": (2, 32, 18, 0),
    "Q8_0": (8, 32, 34, 0),
    "Q4_K": (12, 256, 144, 0),
    "Q6_K": (14, 256, 210, 0),
    "I32": (26, 1, 4, 0),
    "BF16": (30, 1, 2, 0),
    "MXFP4": (39, 32, 17, 0),
    "IQ2_BN": (135, 64, 16, 4),
    "IQ4_KS": (144, 256, 136, 4),
    "IQ2_KL": (157, 256, 86, 2),
    "Q4_0_R8": (202, 32, 18, 0),
    "Q8_0_R8": (208, 32, 34, 0),
    "IQ1_S_R4": (219, 32, 6, 2),
}


class Entry(NamedTuple):
    """A key with its type and value as bytes."""

    key: str
    raw: bytes


class Tensor(NamedTuple):
    """`ne` as in ggml, fastest dimension first."""

    name: str
    type: str
    ne: tuple[int, ...]
    data: bytes


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, kind: str, value: object) -> Entry:
    """`kind` "u32", or "[u32]" for an array."""
    number = NUMBERS[kind.strip("[]")]
    items = value if kind.startswith("[") else [value]
    assert isinstance(items, Sequence)
    packed = b"".join(
        text(item) if number == 8 else struct.pack(f"<{CODES[number]}", item)  # type: ignore[arg-type]
        for item in items
    )
    if kind.startswith("["):
        return Entry(key, struct.pack("<IIQ", 9, number, len(items)) + packed)
    return Entry(key, struct.pack("<I", number) + packed)


def nbytes(kind: str, ne: Sequence[int]) -> int:
    _, block, size, head = TYPES[kind]
    return (head + ne[0] // block * size) * prod(ne[1:])


def write(path: Path, entries: Iterable[Entry], tensors: Iterable[Tensor], alignment: int = 32) -> Path:
    """One file of version 3; `alignment` must agree with the entries."""
    entries, tensors = list(entries), list(tensors)
    raw = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries))
    raw += b"".join(text(e.key) + e.raw for e in entries)
    offset = 0
    for tensor in tensors:
        dims = struct.pack(f"<{len(tensor.ne)}Q", *tensor.ne)
        raw += text(tensor.name) + struct.pack("<I", len(tensor.ne)) + dims
        raw += struct.pack("<IQ", TYPES[tensor.type][0], offset)
        offset += len(tensor.data) + -len(tensor.data) % alignment
    raw += bytes(-len(raw) % alignment)
    for tensor in tensors:
        raw += tensor.data + bytes(-len(tensor.data) % alignment)
    path.write_bytes(raw)
    return path


def write_split(
    folder: Path, prefix: str, entries: Sequence[Entry], tensors: Sequence[Tensor], files: int
) -> Path:
    """The same as a set of `files`, as llama-gguf-split writes it; returns the first."""
    step = -(-len(tensors) // files)
    for number in range(files):
        keys = [
            *(entries if number == 0 else ()),
            Entry("split.no", struct.pack("<IH", 2, number)),
            Entry("split.count", struct.pack("<IH", 2, files)),
            Entry("split.tensors.count", struct.pack("<Ii", 5, len(tensors))),
        ]
        name = f"{prefix}-{number + 1:05d}-of-{files:05d}.gguf"
        write(folder / name, keys, tensors[number * step : (number + 1) * step])
    return folder / f"{prefix}-00001-of-{files:05d}.gguf"


def read(path: Path) -> tuple[dict[str, Entry], dict[str, Tensor]]:
    """Everything in the file, in order."""
    raw, position = path.read_bytes(), 0

    def take(code: str) -> int:
        nonlocal position
        (value,) = struct.unpack_from(f"<{code}", raw, position)
        position += struct.calcsize(f"<{code}")
        return int(value)

    def skip(kind: int) -> None:
        nonlocal position
        length = take("Q") if kind == 8 else struct.calcsize(CODES[kind])
        position += length

    def name() -> str:
        nonlocal position
        length = take("Q")
        position += length
        return raw[position - length : position].decode()

    assert raw[:4] == b"GGUF"
    position = 4
    version, count, keys = take("I"), take("Q"), take("Q")
    assert version in (2, 3)
    entries: dict[str, Entry] = {}
    alignment = 32
    for _ in range(keys):
        key, start = name(), position
        kind = take("I")
        if kind == 9:
            item, length = take("I"), take("Q")
            for _ in range(length):
                skip(item)
        else:
            skip(kind)
        entries[key] = Entry(key, raw[start:position])
        if key == "general.alignment":
            (alignment,) = struct.unpack("<I", raw[position - 4 : position])
    by_number = {row[0]: kind_name for kind_name, row in TYPES.items()}
    table = []
    for _ in range(count):
        tensor = name()
        ne = tuple(take("Q") for _ in range(take("I")))
        table.append((tensor, by_number[take("I")], ne, take("Q")))
    data = position + -position % alignment
    tensors = {}
    for tensor, kind_name, ne, offset in table:
        size = nbytes(kind_name, ne)
        tensors[tensor] = Tensor(tensor, kind_name, ne, raw[data + offset : data + offset + size])
    last = max((offset + nbytes(k, ne) for _, k, ne, offset in table), default=0)
    assert len(raw) == data + last + -last % alignment, "the last tensor must be padded"
    return entries, tensors


@dataclass
class TinyMoe:
    """A model of `blocks` blocks, of which the first `dense` have no experts and the last `mtp` predict further tokens.

    `types` by the name after `blk.N.` without `.weight`; `extra` and `keys` are added, or replace those of their name;
    a key that is None is left out.
    """

    architecture: str = "qwen3moe"
    experts: int = 8
    top_k: int = 2
    blocks: int = 3
    dense: int = 0
    mtp: int = 0
    hidden: int = 32
    width: int = 64
    types: Mapping[str, str] = field(default_factory=dict)
    expert_type: str = "Q8_0"
    fused: bool = False
    biases: bool = False
    selection_bias: str = ""
    keys: Mapping[str, tuple[str, object] | None] = field(default_factory=dict)
    extra: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    """By name after `blk.N.` of blocks with experts: type and dimensions."""

    def entries(self) -> list[Entry]:
        a = self.architecture
        known: dict[str, tuple[str, object] | None] = {
            "general.architecture": ("str", a),
            "general.type": ("str", "model"),
            "general.name": ("str", "Tiny MoE"),
            "general.size_label": ("str", f"{self.experts}x7B"),
            "general.file_type": ("u32", 7),
            f"{a}.block_count": ("u32", self.blocks),
            f"{a}.embedding_length": ("u32", self.hidden),
            f"{a}.feed_forward_length": ("u32", self.width * self.top_k),
            f"{a}.attention.head_count_kv": ("[u32]", list(range(1, self.blocks + 1))),
            f"{a}.expert_count": ("u32", self.experts),
            f"{a}.expert_used_count": ("u32", self.top_k),
            f"{a}.rope.freq_base": ("f32", 10000.5),
            "tokenizer.ggml.tokens": ("[str]", [b"<s>", b"\xff\xfe", "ä".encode()]),
            "tokenizer.ggml.token_type": ("[i32]", [3, 1, 1]),
            "quantize.imatrix.file": ("str", "im.gguf"),
        }
        if self.mtp:
            known[f"{a}.nextn_predict_layers"] = ("u32", self.mtp)
        known |= self.keys
        return [entry(key, *value) for key, value in known.items() if value is not None]

    def tensors(self, seed: int = 0) -> list[Tensor]:
        rng = random.Random(seed)
        made: list[Tensor] = []

        def add(name: str, kind: str, *ne: int) -> None:
            made.append(Tensor(name, kind, ne, rng.randbytes(nbytes(kind, ne))))

        add("token_embd.weight", "Q8_0", self.hidden, 5)
        for block in range(self.blocks):
            p = f"blk.{block}."
            add(p + "attn_norm.weight", "F32", self.hidden)
            # As long as there are experts, but not of them.
            add(p + "attn_q_norm.weight", "F32", self.experts)
            add(p + "attn_q.weight", "F16", self.hidden, self.experts)
            add(p + "ffn_norm.weight", "F32", self.hidden)
            if block < self.dense:
                add(p + "ffn_down.weight", "F16", self.width, self.hidden)
            else:
                self._experts(p, add)
            if block >= self.blocks - self.mtp:
                add(p + "nextn.eh_proj.weight", "F16", 2 * self.hidden, self.hidden)
        add("output_norm.weight", "F32", self.hidden)
        add("output.weight", "Q8_0", self.hidden, 5)
        return made

    def _experts(self, p: str, add: object) -> None:
        assert callable(add)
        e, h, w = self.experts, self.hidden, self.width

        def typed(name: str, default: str) -> str:
            return self.types.get(name, default)

        add(p + "ffn_gate_inp.weight", typed("ffn_gate_inp", "F32"), h, e)
        pair = [("gate_up", h, 2 * w)] if self.fused else [("gate", h, w), ("up", h, w)]
        for name, columns, rows in [*pair, ("down", w, h)]:
            add(f"{p}ffn_{name}_exps.weight", typed(f"ffn_{name}_exps", self.expert_type), columns, rows, e)
            if self.biases:
                add(f"{p}ffn_{name}_exps.bias", "F32", rows, e)
        if self.selection_bias:
            add(p + self.selection_bias, "F32", e)
        for name, (kind, ne) in self.extra.items():
            add(p + name, kind, *ne)

    def write(self, path: Path, seed: int = 0) -> Path:
        return write(path, self.entries(), self.tensors(seed))
