"""Models the runtime's tests share: the embedded checkpoint and a small one that is quick to run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from moe_surgery.checkpoint.resolve import resolve
from tests.runtime.models import write_lively
from tests.support.checkpoints import Shape

if TYPE_CHECKING:
    from moe_surgery.runtime.model import CausalLM
    from moe_surgery.runtime.text import Text

pytest.importorskip("torch")

SMALL = Shape(layers=3, experts=5, top_k=2, vocabulary=40)
WINDOW = 6


def cpu_backends() -> list[str]:
    """Those that can run here."""
    import torch

    from moe_surgery.kernels import select_backend

    return sorted({"reference", select_backend(torch.device("cpu")).name})


@pytest.fixture(scope="session", params=cpu_backends())
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend of the CPU in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def tiny() -> Path:
    return resolve("example:tiny")


@pytest.fixture(scope="session")
def tiny_text(tiny: Path) -> Text:
    from moe_surgery.runtime.text import Text

    return Text(tiny)


@pytest.fixture(scope="session")
def tiny_model(tiny: Path, backend: str) -> CausalLM:
    """In float32."""
    import torch

    from moe_surgery.runtime.load import load_model

    return load_model(tiny, dtype=torch.float32, backend=backend)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights; layers 0 and 2 see a window of `WINDOW` positions, layer 1 all."""
    folder = tmp_path_factory.mktemp("runtime") / "small"
    return write_lively(folder, SMALL, edit_config=lambda c: c.update(sliding_window=WINDOW))


@pytest.fixture(scope="session")
def small_model(small: Path, backend: str) -> CausalLM:
    """In float32."""
    import torch

    from moe_surgery.runtime.load import load_model

    return load_model(small, dtype=torch.float32, backend=backend)


@pytest.fixture(scope="session")
def quick_model(small: Path) -> CausalLM:
    """`small_model` with the CPU's own backend alone: for rules and counts that are the same with any."""
    import torch

    from moe_surgery.runtime.load import load_model

    return load_model(small, dtype=torch.float32)


@pytest.fixture(scope="session")
def steady_model(small_model: CausalLM) -> CausalLM:
    """`small_model` with all experts chosen, so that ties in a router cannot differ between a batch and one text."""
    from moe_surgery.runtime.view import view

    return view(small_model, None, top_k=SMALL.experts)
