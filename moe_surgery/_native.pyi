"""The compiled kernels; see moe_surgery.formats.mxfp4 for what they compute.

Every array is contiguous in all axes but the first, whose stride is free. A shape, layout or `isa`
that does not fit raises ValueError, a wrong dtype TypeError.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

def instruction_sets() -> list[str]: ...
def decode(
    blocks: NDArray[np.uint8], scales: NDArray[np.uint8], out: NDArray[np.uint16], isa: str = ""
) -> None: ...
def decode_transposed(
    blocks: NDArray[np.uint8], scales: NDArray[np.uint8], out: NDArray[np.uint16], isa: str = ""
) -> None: ...
def encode_transposed(
    values: NDArray[np.uint16], blocks: NDArray[np.uint8], scales: NDArray[np.uint8], isa: str = ""
) -> tuple[int, float, float, tuple[int, int] | None]: ...
def q8_0_instruction_sets() -> list[str]: ...
def encode_q8_0(
    values: NDArray[np.uint16] | NDArray[np.uint32], out: NDArray[np.uint8], isa: str = ""
) -> int: ...

# The CPU kernels, for moe_surgery.kernels.native alone: tensors are addresses, strides are bytes, nothing
# is checked. Values are (address or 0, dtype: 0 BF16, 1 F16, 2 F32); (weight, row stride, rows, columns, bias,
# y) is a product.
Values = tuple[int, int]
Product = tuple[Values, int, int, int, Values, int]

TILED_TOKENS: int

class ExpertMatrix: ...

class Engine:
    def __init__(self, isa: str, threads: int, tiled: bool = False) -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def tiled(self) -> bool: ...
    def products(self, x: int, tokens: int, products: list[Product]) -> None: ...
    def route(self, x: int, tokens: int, router: Product, top_k: int, ids: int, weights: int) -> None: ...
    def experts(
        self,
        x: int,
        ids: int,
        weights: int,
        tokens: int,
        top_k: int,
        gate_up: ExpertMatrix,
        down: ExpertMatrix,
        limit: float,
        alpha: float,
        y: int,
    ) -> None: ...
    def measured_experts(
        self,
        x: int,
        ids: int,
        weights: int,
        tokens: int,
        top_k: int,
        gate_up: ExpertMatrix,
        down: ExpertMatrix,
        limit: float,
        alpha: float,
        y: int,
        groups: int,
        norms: int,
        least: int,
        largest: int,
        sums: int,
    ) -> None: ...
    def rms_norm(self, x: int, tokens: int, columns: int, weight: Values, eps: float, y: int) -> None: ...
    def attention(
        self,
        q: int,
        keys: int,
        key_strides: tuple[int, int, int],
        values: int,
        value_strides: tuple[int, int, int],
        wide: bool,
        sinks: int,
        query_positions: int,
        key_positions: int,
        sizes: tuple[int, int, int, int, int, int, int],
        out: int,
    ) -> None: ...
    def choose(
        self,
        stack: object,
        layer: int,
        x: int,
        batch: int,
        seq_len: int,
        positions: int,
        cos: int,
        sin: int,
        caches: Sequence[tuple[object, ...]],
        choice: tuple[int, int, int],
    ) -> None: ...

def cpu_instruction_sets() -> list[str]: ...
def packed_matrix(
    blocks: int,
    expert_block_stride: int,
    block_stride: int,
    scales: int,
    expert_scale_stride: int,
    scale_stride: int,
    experts: int,
    rows: int,
    columns: int,
    bias: Values,
) -> ExpertMatrix: ...
def dense_matrix(
    values: Values,
    expert_stride: int,
    column_stride: int,
    experts: int,
    rows: int,
    columns: int,
    bias: Values,
) -> ExpertMatrix: ...
def apply_rope(
    x: int,
    x_strides: Sequence[int],
    cos: int,
    cos_strides: Sequence[int],
    sin: int,
    sin_strides: Sequence[int],
    shape: Sequence[int],
    y: int,
) -> None: ...
def rope_cos_sin(
    positions: int, count: int, frequencies: int, width: int, scale: float, cos: int, sin: int
) -> None: ...
def read_bytes(address: int, bytes: int, threads: int) -> int: ...

class Reads:
    def __init__(self, threads: int) -> None: ...
    def start(self, pieces: Sequence[tuple[int, int, int, int, int]], kind: int) -> int: ...
    def hurry(self, load: int) -> None: ...
    def cancel(self, load: int) -> int: ...
    def outcome(self, load: int) -> tuple[bool, int, int]: ...
    def wait(self, loads: Sequence[int], milliseconds: int) -> int: ...
    def forget(self, load: int) -> None: ...
    def close(self) -> None: ...
    @property
    def bytes(self) -> int: ...
