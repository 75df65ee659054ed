"""Backends are chosen by name, and one that was asked for is never replaced."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from moe_surgery.errors import UsageError  # noqa: E402
from moe_surgery.kernels import BACKENDS, select_backend  # noqa: E402


@pytest.mark.parametrize("name", ["", "Reference", "cudnn"])
def test_an_unknown_backend_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        select_backend(torch.device("cpu"), name)
    assert str(caught.value) == f"--backend {name}: unknown; known: {', '.join(BACKENDS)}"


@pytest.mark.parametrize("name", [None, "reference"])
def test_the_cpu_runs_plain_pytorch_asked_for_or_not(name: str | None) -> None:
    assert select_backend(torch.device("cpu"), name).name == "reference"
