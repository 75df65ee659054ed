"""What the tests of the native backend share: its variants here, and arithmetic in float64."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moe_surgery.kernels.native import NativeBackend  # noqa: E402
from moe_surgery.kernels.reference import ReferenceBackend  # noqa: E402
from tests.kernels.brute_force import Case  # noqa: E402

VARIANTS = NativeBackend.instruction_sets()
# Those that multiply many tokens in tiles.
TILED = [isa for isa in VARIANTS if isa in ("amx", "avx512bf16")]
needs_native = pytest.mark.skipif(not VARIANTS, reason="the native extension is not built, or disabled")
every_variant = pytest.mark.parametrize("isa", VARIANTS)

_backends: dict[tuple[str, int], NativeBackend] = {}


def native(isa: str = "", threads: int = 1) -> NativeBackend:
    """One backend per variant and number of threads, created once."""
    if (isa, threads) not in _backends:
        _backends[isa, threads] = NativeBackend(isa, threads)
    return _backends[isa, threads]


def run(backend: NativeBackend | ReferenceBackend, case: Case, dtype: torch.dtype) -> torch.Tensor:
    x, weights = (torch.from_numpy(a).to(dtype) for a in (case.x, case.weights))
    return backend.experts(x, torch.from_numpy(case.ids), weights, case.experts)


def draw(seed: int, *shape: int) -> torch.Tensor:
    """Standard normal float32."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def relative_error(got: torch.Tensor, exact: np.ndarray) -> float:
    """Norm of the error over the norm of what is right."""
    scale = float(np.linalg.norm(exact))
    return float(np.linalg.norm(got.double().numpy() - exact)) / (scale or 1.0)


def shifted(tensor: torch.Tensor, by: int) -> torch.Tensor:
    """The same values `by` bytes past an aligned address, a multiple of the item's size."""
    buffer = torch.empty(tensor.nbytes + by + 64, dtype=torch.uint8)
    start = -buffer.data_ptr() % 64 + by
    moved = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    moved.copy_(tensor)
    assert moved.data_ptr() % 64 == by % 64
    return moved
