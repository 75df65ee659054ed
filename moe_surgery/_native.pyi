"""The compiled kernels; see moe_surgery.formats.mxfp4 for what they compute.

Every array is contiguous in all axes but the first, whose stride is free. A shape, layout or `isa`
that does not fit raises ValueError, a wrong dtype TypeError.
"""

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
