"""Backends are chosen by name, and one that was asked for is never replaced."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from moe_surgery.errors import UsageError  # noqa: E402
from moe_surgery.kernels import BACKENDS, backend_states, select_backend  # noqa: E402


@pytest.mark.parametrize("name", ["", "Reference", "cudnn"])
def test_an_unknown_backend_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        select_backend(torch.device("cpu"), name)
    assert str(caught.value) == f"--backend {name}: unknown; known: {', '.join(BACKENDS)}"


def test_plain_pytorch_runs_on_the_cpu_when_asked_for() -> None:
    assert select_backend(torch.device("cpu"), "reference").name == "reference"


def test_an_invariant_backend_is_that_backend_one_token_at_a_time() -> None:
    assert select_backend(torch.device("cpu"), "reference-invariant").name == "reference-invariant"
    with pytest.raises(UsageError, match="unknown"):
        select_backend(torch.device("cpu"), "native-invariant")


def test_states_say_what_is_chosen_on_the_cpu_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(backend_states()) == set(BACKENDS)
    monkeypatch.setenv("MOE_SURGERY_NATIVE", "0")
    assert backend_states()["native"] == "no: disabled by MOE_SURGERY_NATIVE=0"
