"""Every test that takes `isa` runs for each implementation available on this machine."""

from __future__ import annotations

import pytest

from moe_surgery.formats import mxfp4


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", mxfp4.instruction_sets())
