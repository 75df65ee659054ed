"""Every kernel with every entry of the block table, at the shapes of gpt-oss, as launches on no device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.kernels.decode_entries import decode_entries
from moe_surgery.kernels.triton import dispatch, route, slots, tiles
from moe_surgery.kernels.triton.blocks import SPLITS, TILE_TOKENS, Chip, entry
from moe_surgery.kernels.triton.launch import Launch
from moe_surgery.kernels.triton.operands import Operand

__all__ = ["DEVICES", "entries", "samples"]

# Architecture -> (multiprocessors of its usual card, shared memory a block may have in bytes).
DEVICES = {
    80: (108, 163 << 10),
    86: (84, 99 << 10),
    89: (128, 99 << 10),
    90: (132, 227 << 10),
    100: (148, 227 << 10),
    120: (170, 99 << 10),
}
HIDDEN = UNITS = 2880
EXPERTS, TOP_K = 32, 4
META = torch.device("meta")


def entries(arch: int) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of all kernels for an architecture of `DEVICES`; the tensors are meta tensors."""
    chip = Chip(arch, DEVICES[arch][0])
    yield from _routers(chip)
    yield from _dispatches()
    for mxfp4 in (True, False):
        for split in SPLITS:
            yield from _slots(arch, mxfp4, split)
        for width in TILE_TOKENS:
            for split in (1, 4) if width <= 16 else (1,):
                yield from _tiles(arch, mxfp4, width, split)
    # What differs by a flag and not by blocks: scales past the plain range, and a pruned view.
    yield from _slots(arch, True, 1, general=True, indexed=True)
    yield from _tiles(arch, True, 16, 1, general=True, indexed=True)
    yield from _tiles(arch, True, 16, 1, dtype=torch.float32)
    parts = _empty(64 * TOP_K, HIDDEN, dtype=torch.float32)
    yield "combine", tiles.combine(parts, _empty(64, HIDDEN), TOP_K)
    yield from decode_entries(DEVICES[arch][0])


def samples(arch: int) -> dict[str, Launch]:
    """One entry of each kernel: what the test-suite compiles."""
    wanted = (
        "route 1x32", "dispatch 64 1", "dispatch 4096 1", "gate_up slots mxfp4 split 2",
        "down slots mxfp4 split 2", "gate_up tiles 16 mxfp4 split 1", "down tiles 16 mxfp4 split 1", "combine",
        "norm added 8", "qkv full 1", "attention ring 1", "output 8", "unembed 1",
    )  # fmt: skip
    named = dict(entries(arch))
    return {name: named[name] for name in wanted}


def _routers(chip: Chip) -> Iterator[tuple[str, Launch]]:
    for tokens, experts, top_k in (
        (1, 4, 4), (1, 32, 4), (1, 128, 4), (1, 1024, 8), (1, 32, 32),
        (64, 4, 4), (64, 32, 4), (64, 128, 4), (64, 1024, 8), (4096, 32, 4), (64, 32, 32),
    ):  # fmt: skip
        launch = route.route(
            _empty(tokens, HIDDEN), _empty(experts, HIDDEN), _empty(experts), top_k,
            _empty(tokens, top_k, dtype=torch.int64), _empty(tokens, top_k), chip, wide=False,
        )  # fmt: skip
        yield f"route {tokens}x{experts}" + (" sorted" if top_k > 16 else ""), launch


def _dispatches() -> Iterator[tuple[str, Launch]]:
    for assignments, experts in ((64, EXPERTS), (1024, EXPERTS), (4096, EXPERTS), (4096, 1024)):
        schedule = dispatch.schedule_for(assignments, experts, 16, META)
        ids = _empty(assignments // TOP_K, TOP_K, dtype=torch.int64)
        suffix = "" if experts == EXPERTS else f" of {experts}"
        for number, launch in enumerate(dispatch.dispatch(ids, experts, schedule), 1):
            yield f"dispatch {assignments} {number}{suffix}", launch


def _slots(
    arch: int, mxfp4: bool, split: int, general: bool = False, indexed: bool = False
) -> Iterator[tuple[str, Launch]]:
    ids, weights = _empty(1, TOP_K, dtype=torch.int64), _empty(1, TOP_K)
    index = _empty(EXPERTS, dtype=torch.int64) if indexed else None
    z = _empty(TOP_K, UNITS)
    suffix = f"{_format(mxfp4)} split {split}" + (" general indexed" if general else "")
    up, down = _weight(2 * UNITS, HIDDEN, mxfp4, general), _weight(HIDDEN, UNITS, mxfp4, general)
    yield (
        f"gate_up slots {suffix}",
        slots.gate_up_slots(
            _empty(1, HIDDEN), ids, index, up, z, 7.0, 1.702, entry(arch, "gate_up", mxfp4), split
        ),
    )
    yield (
        f"down slots {suffix}",
        slots.down_slots(z, ids, weights, index, down, _empty(1, HIDDEN), entry(arch, "down", mxfp4), split),
    )


def _tiles(
    arch: int, mxfp4: bool, width: int, split: int,
    general: bool = False, indexed: bool = False, dtype: torch.dtype = torch.bfloat16,
) -> Iterator[tuple[str, Launch]]:  # fmt: skip
    tokens = 8 * width
    pairs, wide = tokens * TOP_K, dtype != torch.bfloat16
    index = _empty(EXPERTS, dtype=torch.int64) if indexed else None
    schedule = dispatch.schedule_for(pairs, EXPERTS, width, META)
    z, out = _empty(pairs, UNITS, dtype=dtype), _empty(pairs, HIDDEN, dtype=torch.float32)
    suffix = f"{width} {_format(mxfp4)} split {split}"
    suffix += (" general indexed" if general else "") + (" float32" if wide else "")
    up, down = _weight(2 * UNITS, HIDDEN, mxfp4, general), _weight(HIDDEN, UNITS, mxfp4, general)
    yield f"gate_up tiles {suffix}", tiles.gate_up_tiles(
        _empty(tokens, HIDDEN, dtype=dtype), TOP_K, schedule, index, up, z, 7.0, 1.702,
        entry(arch, "gate_up", mxfp4, width, wide), split, wide,
    )  # fmt: skip
    yield f"down tiles {suffix}", tiles.down_tiles(
        z, _empty(tokens, TOP_K, dtype=dtype), schedule, index, down, out,
        entry(arch, "down", mxfp4, width, wide), split, wide,
    )  # fmt: skip


def _weight(rows: int, columns: int, mxfp4: bool, general: bool) -> Operand:
    bias = _empty(EXPERTS, rows)
    if not mxfp4:
        values = _empty(EXPERTS, columns, rows)
        return Operand(values, values, bias, rows, columns, False, False)
    data = _empty(EXPERTS, rows, columns // 32, 16, dtype=torch.uint8)
    return Operand(data, _empty(*data.shape[:3], dtype=torch.uint8), bias, rows, columns, True, general)


def _format(mxfp4: bool) -> str:
    return "mxfp4" if mxfp4 else "dense"


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)
