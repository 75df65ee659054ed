"""Settings of the whole suite."""

from __future__ import annotations

from hypothesis import settings

# Machines differ in speed and so do runs: how long an example takes says nothing about the code.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")
