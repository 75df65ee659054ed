"""A pruned GGUF file by brute force: every tensor cut into as many equal pieces as it has experts."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.raw_gguf import Entry, Tensor, read

_CUT = re.compile(
    r"blk\.(\d+)\.(?:ffn_(?:gate|up|down|gate_up)_exps\.(?:weight|bias|scale|input_scale)"
    r"|ffn_gate_inp\.(?:weight|bias)|exp_probs_b(?:_vl)?(?:\.bias)?|ffn_(?:gate|up|down)_chexps\.weight)"
)
_TABLE = re.compile(r"blk\.(\d+)\.ffn_gate_tid2eid\.weight")

Kept = Mapping[int, Sequence[int]]
"""By block."""


def sliced(tensor: Tensor, kept: Kept, experts: int) -> Tensor:
    """The tensor with only the kept experts of its block, in their order."""
    if (table := _TABLE.fullmatch(tensor.name)) is not None:
        return tensor._replace(data=renumbered(tensor, kept[int(table[1])]))
    match = _CUT.fullmatch(tensor.name)
    if match is None:
        return tensor
    rows = kept[int(match[1])]
    size, rest = divmod(len(tensor.data), experts)
    assert rest == 0
    assert tensor.ne[-1] == experts
    data = b"".join(tensor.data[e * size : (e + 1) * size] for e in rows)
    return tensor._replace(ne=(*tensor.ne[:-1], len(rows)), data=data)


def renumbered(tensor: Tensor, rows: Sequence[int]) -> bytes:
    """Each row of the table in new numbers; a dropped expert's place takes one that the row does not have."""
    values = list(struct.unpack(f"<{len(tensor.data) // 4}i", tensor.data))
    width, new = tensor.ne[0], {old: number for number, old in enumerate(rows)}
    for start in range(0, len(values), width):
        row = values[start : start + width]
        taken = {new[e] for e in row if e in new}
        for place, expert in enumerate(row):
            number = new.get(expert, -1)
            if number < 0:
                number = expert % len(rows)
                while number in taken:
                    number = (number + 1) % len(rows)
                taken.add(number)
            values[start + place] = number
    return struct.pack(f"<{len(values)}i", *values)


def read_set(first: Path) -> tuple[dict[str, Entry], dict[str, Tensor]]:
    """The keys of the first file, and the tensors of all files of its set, in order."""
    entries, tensors = read(first)
    match = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", first.name)
    if "split.count" not in entries or match is None:
        return entries, tensors
    for number in range(2, int(match[2]) + 1):
        others, more = read(first.with_name(f"{match[1]}-{number:05d}-of-{match[2]}.gguf"))
        assert list(others) == ["split.no", "split.count", "split.tensors.count"]
        assert struct.unpack("<IH", others["split.no"].raw) == (2, number - 1)
        assert not tensors.keys() & more.keys()
        tensors |= more
    return entries, tensors


def assert_pruned(source: Path, out: Path, kept: Kept, experts: int, *, dropped: Sequence[int] = ()) -> None:
    """Every tensor of `out` is that of `source` cut by brute force, in the same order; `dropped` blocks are gone."""
    _, before = read_set(source)
    _, after = read_set(out)
    prefixes = tuple(f"blk.{block}." for block in dropped)
    expected = [sliced(t, kept, experts) for t in before.values() if not t.name.startswith(prefixes)]
    assert list(after) == [t.name for t in expected]
    for tensor in expected:
        assert after[tensor.name] == tensor, tensor.name
