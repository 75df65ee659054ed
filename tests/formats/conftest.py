"""Every test that takes `isa` or `q8_0_isa` runs for each implementation available on this machine."""

from __future__ import annotations

import pytest

from moe_surgery.formats import mxfp4, q8_0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", mxfp4.instruction_sets())
    if "q8_0_isa" in metafunc.fixturenames:
        metafunc.parametrize("q8_0_isa", q8_0.instruction_sets())
