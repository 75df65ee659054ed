"""Random weights of gpt-oss-20b's sizes, more of them than any cache holds, and ways to multiply by them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_surgery.formats.native import native_module
from moe_surgery.kernels.native import NativeBackend
from moe_surgery.kernels.weights import DenseWeight, ExpertWeights, Mxfp4Weight

HIDDEN = 2880
ROWS = 36864  # of the dense weight: 212 MB
EXPERTS = 16  # 212 MB packed
TOP_K = 4
DENSE_EXPERTS = 4  # 199 MB in BF16


@dataclass
class Measured:
    """`run` reads `nbytes` of weights once."""

    name: str
    nbytes: int
    run: Callable[[], object]


def random_bytes(*shape: int, low: int = 0, high: int = 256) -> torch.Tensor:
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def random_bf16(*shape: int) -> torch.Tensor:
    bits = torch.randint(0x3C00, 0x3D00, shape, dtype=torch.int16, generator=torch.Generator().manual_seed(1))
    return bits.view(torch.bfloat16)


class Operands:
    def __init__(self) -> None:
        self.dense = random_bf16(ROWS, HIDDEN)
        packed = [
            Mxfp4Weight(
                random_bytes(EXPERTS, rows, HIDDEN // 32, 16),
                random_bytes(EXPERTS, rows, HIDDEN // 32, low=118, high=122),
            )
            for rows in (2 * HIDDEN, HIDDEN)
        ]
        wide = [DenseWeight(random_bf16(DENSE_EXPERTS, HIDDEN, rows)) for rows in (2 * HIDDEN, HIDDEN)]
        self.packed = self._layer(packed, EXPERTS)
        self.wide = self._layer(wide, DENSE_EXPERTS)

    def _layer(self, weights: list, experts: int) -> ExpertWeights:
        up, down = weights
        return ExpertWeights(up, random_bf16(experts, 2 * HIDDEN), down, random_bf16(experts, HIDDEN))

    def plain_read(self, threads: int) -> Measured:
        native, nbytes = native_module(), self.dense.nbytes
        assert native is not None
        return Measured(
            "plain read", nbytes, lambda: native.read_bytes(self.dense.data_ptr(), nbytes, threads)
        )

    def torch_linear(self, tokens: int) -> Measured:
        x = torch.randn(tokens, HIDDEN).bfloat16()
        return Measured(
            "torch BF16 linear", self.dense.nbytes, lambda: torch.nn.functional.linear(x, self.dense)
        )

    def linear(self, backend: NativeBackend, tokens: int) -> Measured:
        x = torch.randn(tokens, HIDDEN)
        return Measured("BF16 linear", self.dense.nbytes, lambda: backend.linear(x, self.dense))

    def experts(self, backend: NativeBackend, tokens: int, packed: bool) -> Measured:
        """Every stored expert once, four at a time; at more tokens they come in pairs for an expert."""
        layer, experts = (self.packed, EXPERTS) if packed else (self.wide, DENSE_EXPERTS)
        weights = (layer.gate_up, layer.down)
        nbytes = sum(
            w.blocks.nbytes + w.scales.nbytes if isinstance(w, Mxfp4Weight) else w.values.nbytes
            for w in weights
        )
        # `tokens` share out the experts: token t takes TOP_K from t * TOP_K // 2 on.
        at_once = min(experts, max(TOP_K, tokens * TOP_K // 2))
        calls = []
        for start in range(0, experts, at_once):
            first = torch.arange(tokens) // 2 * TOP_K
            ids = start + (first[:, None] + torch.arange(TOP_K)) % at_once
            calls.append(ids % experts)
        x, shares = torch.randn(tokens, HIDDEN), torch.full((tokens, TOP_K), 0.25)

        def run() -> None:
            for ids in calls:
                backend.experts(x, ids, shares, layer)

        return Measured("MXFP4 experts" if packed else "BF16 experts", nbytes, run)
