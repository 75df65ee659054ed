"""What the suites share: the model they measure, views of it, and the rate of a plain read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from moe_surgery.runtime.model import CausalLM


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--checkpoint",
        default="example:tiny",
        metavar="CKPT",
        help="What benchmarks/suites measures: a folder, an example or a cached hub id (default: example:tiny).",
    )


@pytest.fixture(scope="session")
def checkpoint(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--checkpoint"))


@pytest.fixture(scope="session")
def target(checkpoint: str) -> CausalLM:
    """On the CPU, with its default backend and dtype."""
    from moe_surgery.runtime.load import load_model

    return load_model(checkpoint)


@pytest.fixture
def shown(checkpoint: str, target: CausalLM, experts: int | None) -> CausalLM:
    """A view of the target with that many experts, drawn at random; None: the target itself."""
    from moe_surgery.pipeline.planning import inspect
    from moe_surgery.runtime.view import view
    from moe_surgery.selection.plan import plan_random

    if experts is None:
        return target
    if experts >= target.config.num_local_experts:
        pytest.skip(f"the model has {target.config.num_local_experts} experts")
    return view(target, plan_random(experts, 0, inspect(checkpoint)))


@pytest.fixture(scope="session")
def bandwidth(target: CausalLM) -> float:
    """Bytes a second of a plain read loop."""
    from moe_surgery.bench.memory import read_bandwidth

    return read_bandwidth(target.device)
