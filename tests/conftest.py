"""Settings of the whole suite."""

from __future__ import annotations

import os
import sys

from hypothesis import settings

# Workers share the machine's cores: threads of torch that wait for one another would only spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Workers get a width of 80; tables are as wide as they need where a test sets none.
os.environ.pop("COLUMNS", None)

# Machines differ in speed and so do runs: how long an example takes says nothing about the code.
# Tests that set no number of examples try 50; `pytest --hypothesis-profile=thorough` tries many more.
settings.register_profile("suite", deadline=None, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=2000)
settings.load_profile("suite")


def pytest_runtest_setup() -> None:
    """Seed torch's global generator, so that no test depends on which ones ran before it."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
