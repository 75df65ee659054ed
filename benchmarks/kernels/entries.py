"""Every kernel with every entry of the block table, at the shapes of gpt-oss, as launches on no device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.kernels.decode_entries import decode_entries
from moe_surgery.kernels.triton import moe_gemv, moe_grouped_gemm, route, routing_metadata
from moe_surgery.kernels.triton.launch import Launch
from moe_surgery.kernels.triton.operands import Operand
from moe_surgery.kernels.triton.tuning import BLOCK_N_CHOICES, SPLIT_K_CHOICES, DeviceProps, blocks_for

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
HIDDEN = INTERMEDIATE = 2880
EXPERTS, TOP_K = 32, 4
META = torch.device("meta")


def entries(arch: int) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of all kernels for an architecture of `DEVICES`; the tensors are meta tensors."""
    device_props = DeviceProps(arch, DEVICES[arch][0])
    yield from _routers(device_props)
    yield from _routing_metadata()
    for mxfp4 in (True, False):
        for split_k in SPLIT_K_CHOICES:
            yield from _gemv(arch, mxfp4, split_k)
        for block_n in BLOCK_N_CHOICES:
            for split_k in (1, 4) if block_n <= 16 else (1,):
                yield from _grouped_gemm(arch, mxfp4, block_n, split_k)
    # What differs by a flag and not by blocks: scales past the plain range, and a pruned view.
    yield from _gemv(arch, True, 1, any_e8m0=True, has_expert_map=True)
    yield from _grouped_gemm(arch, True, 16, 1, any_e8m0=True, has_expert_map=True)
    yield from _grouped_gemm(arch, True, 16, 1, dtype=torch.float32)
    parts = _empty(64 * TOP_K, HIDDEN, dtype=torch.float32)
    yield "combine", moe_grouped_gemm.combine(parts, _empty(64, HIDDEN), TOP_K)
    yield from decode_entries(DEVICES[arch][0])


def samples(arch: int) -> dict[str, Launch]:
    """One entry of each kernel: what the test-suite compiles."""
    expected = (
        "route 1x32", "routing_metadata 64 1", "routing_metadata 4096 1", "gate_up gemv mxfp4 split_k 2",
        "down gemv mxfp4 split_k 2", "gate_up grouped_gemm 16 mxfp4 split_k 1", "down grouped_gemm 16 mxfp4 split_k 1",
        "combine", "norm added 8", "qkv full 1", "attention ring 1", "output 8", "unembed 1",
    )  # fmt: skip
    named = dict(entries(arch))
    return {name: named[name] for name in expected}


def _routers(device_props: DeviceProps) -> Iterator[tuple[str, Launch]]:
    for tokens, experts, top_k in (
        (1, 4, 4), (1, 32, 4), (1, 128, 4), (1, 1024, 8), (1, 32, 32),
        (64, 4, 4), (64, 32, 4), (64, 128, 4), (64, 1024, 8), (4096, 32, 4), (64, 32, 32),
    ):  # fmt: skip
        launch = route.route(
            _empty(tokens, HIDDEN), _empty(experts, HIDDEN), _empty(experts), top_k,
            _empty(tokens, top_k, dtype=torch.int64), _empty(tokens, top_k), device_props, upcast_fp32=False,
        )  # fmt: skip
        yield f"route {tokens}x{experts}" + (" sorted" if top_k > 16 else ""), launch


def _routing_metadata() -> Iterator[tuple[str, Launch]]:
    for assignments, experts in ((64, EXPERTS), (1024, EXPERTS), (4096, EXPERTS), (4096, 1024)):
        routing = routing_metadata.empty_routing(assignments, experts, 16, META)
        ids = _empty(assignments // TOP_K, TOP_K, dtype=torch.int64)
        suffix = "" if experts == EXPERTS else f" of {experts}"
        for number, launch in enumerate(routing_metadata.routing_launches(ids, experts, routing), 1):
            yield f"routing_metadata {assignments} {number}{suffix}", launch


def _gemv(
    arch: int, mxfp4: bool, split_k: int, any_e8m0: bool = False, has_expert_map: bool = False
) -> Iterator[tuple[str, Launch]]:
    ids, weights = _empty(1, TOP_K, dtype=torch.int64), _empty(1, TOP_K)
    expert_map = _empty(EXPERTS, dtype=torch.int64) if has_expert_map else None
    z = _empty(TOP_K, INTERMEDIATE)
    suffix = f"{_format(mxfp4)} split_k {split_k}" + (" any_e8m0 expert_map" if any_e8m0 else "")
    up, down = (
        _weight(2 * INTERMEDIATE, HIDDEN, mxfp4, any_e8m0),
        _weight(HIDDEN, INTERMEDIATE, mxfp4, any_e8m0),
    )
    yield (
        f"gate_up gemv {suffix}",
        moe_gemv.gate_up_gemv(
            _empty(1, HIDDEN), ids, expert_map, up, z, 7.0, 1.702, blocks_for(arch, "gate_up", mxfp4), split_k
        ),
    )
    yield (
        f"down gemv {suffix}",
        moe_gemv.down_gemv(
            z, ids, weights, expert_map, down, _empty(1, HIDDEN), blocks_for(arch, "down", mxfp4), split_k
        ),
    )


def _grouped_gemm(
    arch: int, mxfp4: bool, block_n: int, split_k: int,
    any_e8m0: bool = False, has_expert_map: bool = False, dtype: torch.dtype = torch.bfloat16,
) -> Iterator[tuple[str, Launch]]:  # fmt: skip
    tokens = 8 * block_n
    pairs, upcast_fp32 = tokens * TOP_K, dtype != torch.bfloat16
    expert_map = _empty(EXPERTS, dtype=torch.int64) if has_expert_map else None
    routing = routing_metadata.empty_routing(pairs, EXPERTS, block_n, META)
    z, out = _empty(pairs, INTERMEDIATE, dtype=dtype), _empty(pairs, HIDDEN, dtype=torch.float32)
    suffix = f"{block_n} {_format(mxfp4)} split_k {split_k}"
    suffix += (" any_e8m0 expert_map" if any_e8m0 else "") + (" float32" if upcast_fp32 else "")
    up, down = (
        _weight(2 * INTERMEDIATE, HIDDEN, mxfp4, any_e8m0),
        _weight(HIDDEN, INTERMEDIATE, mxfp4, any_e8m0),
    )
    yield f"gate_up grouped_gemm {suffix}", moe_grouped_gemm.gate_up_grouped_gemm(
        _empty(tokens, HIDDEN, dtype=dtype), TOP_K, routing, expert_map, up, z, 7.0, 1.702,
        blocks_for(arch, "gate_up", mxfp4, block_n, upcast_fp32), split_k, upcast_fp32,
    )  # fmt: skip
    yield f"down grouped_gemm {suffix}", moe_grouped_gemm.down_grouped_gemm(
        z, _empty(tokens, TOP_K, dtype=dtype), routing, expert_map, down, out,
        blocks_for(arch, "down", mxfp4, block_n, upcast_fp32), split_k, upcast_fp32,
    )  # fmt: skip


def _weight(rows: int, columns: int, mxfp4: bool, any_e8m0: bool) -> Operand:
    bias = _empty(EXPERTS, rows)
    if not mxfp4:
        values = _empty(EXPERTS, columns, rows)
        return Operand(values, values, bias, rows, columns, False, False)
    data = _empty(EXPERTS, rows, columns // 32, 16, dtype=torch.uint8)
    return Operand(data, _empty(*data.shape[:3], dtype=torch.uint8), bias, rows, columns, True, any_e8m0)


def _format(mxfp4: bool) -> str:
    return "mxfp4" if mxfp4 else "dense"


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)
