"""Figures of kernels: which calls, and the bytes of weights that they read."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from moe_surgery.bench.kernels import kernel_figures, measure_kernels, usable_backends  # noqa: E402
from moe_surgery.bench.memory import read_bandwidth  # noqa: E402
from moe_surgery.errors import UsageError  # noqa: E402

CPU = torch.device("cpu")


def test_the_reference_runs_everywhere_and_triton_not_on_the_cpu() -> None:
    assert "reference" in usable_backends(CPU)
    assert "triton" not in usable_backends(CPU)


def test_bytes_and_rates_agree() -> None:
    runs = list(measure_kernels(["reference"], CPU, expert_counts=[2, 6], tokens=[1, 3], hidden=64, rounds=2))
    figures = kernel_figures(runs, 1e9)
    assert len(runs) == 2 * len(figures)
    assert [(f.operation, f.experts, f.tokens) for f in figures] == [
        (o, n, t) for n in (2, 6) for t in (1, 3) for o in ("route", "experts", "dense")
    ]
    expert = 3 * 64 * 64 * 17 // 32 + 3 * 64 * 2  # MXFP4 and BF16 biases
    for f in figures:
        assert f.rate == pytest.approx(f.read_bytes / f.seconds)
        assert f.share == pytest.approx(f.rate / 1e9)
        if f.operation == "route":
            assert f.read_bytes == f.experts * 64 * 2
        elif f.operation == "dense":
            assert f.read_bytes == 64 * 64 * 2
        else:
            assert f.read_bytes % expert == 0
            assert min(4, f.experts) <= f.read_bytes // expert <= min(f.experts, 4 * f.tokens)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hidden": 40}, "`hidden` 40: must be a multiple of 32"),
        ({"tokens": [0]}, "`tokens` 0: must be at least 1"),
    ],
)
def test_shapes_that_cannot_be_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        next(measure_kernels(["reference"], CPU, **options))  # type: ignore[arg-type]


def test_a_read_loop_reads() -> None:
    assert read_bandwidth(CPU, 1 << 20) > 0
