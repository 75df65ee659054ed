"""Damage to a pruned checkpoint, and what verify says about it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moe_surgery.checkpoint.header import Header, read_header
from moe_surgery.checkpoint.local_file import LocalFile
from moe_surgery.pipeline.pruning import prune
from moe_surgery.selection.plan import plan_keeping
from moe_surgery.surgery.verify import verify_checkpoint

FLIPS = (0x01, 0x20, 0x80)


def pruned(source: Path, out: Path, dtype: str = "keep") -> None:
    prune(source, out, lambda m: plan_keeping([0, 1, 3], m), store=dtype, max_shard_size=25_000)


def problems(out: Path) -> tuple[str, ...]:
    return verify_checkpoint(out).problems


def flip(path: Path, offset: int, mask: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def header_of(shard: Path) -> Header:
    with LocalFile(shard) as file:
        return read_header(file)


def header_offsets(shard: Path) -> Iterator[int]:
    """Offsets in the length, in the JSON and in the padding of a shard's header."""
    start = header_of(shard).data_start
    end = len(shard.read_bytes()[:start].rstrip(b" "))
    assert end < start - 1
    yield from range(8)
    yield from range(8, end, max(1, (end - 8) // 30))
    yield from (end - 1, end, start - 1)


def tensor_offsets(shard: Path) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """The first, a middle and the last byte of every tensor."""
    header = header_of(shard)
    for t in header.tensors.values():
        begin, end = header.data_start + t.begin, header.data_start + t.end
        yield t.name, (begin, (begin + end) // 2, end - 1)


def damaged(shard: Path, tensor: str) -> str:
    return f"{shard}: tensor '{tensor}': its digest does not match the manifest"


def check_found(out: Path, file: str) -> None:
    result = problems(out)
    assert any(f"{out / file}: " in problem for problem in result), result
