"""Backends are chosen by name, and a named one is never replaced."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")

from moe_surgery import kernels  # noqa: E402
from moe_surgery.errors import UsageError  # noqa: E402
from moe_surgery.formats import native  # noqa: E402
from moe_surgery.kernels import BACKENDS, backend_states, select_backend  # noqa: E402
from tests.support.command import call  # noqa: E402


@pytest.mark.parametrize("name", ["", "Reference", "cudnn"])
def test_an_unknown_backend_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        select_backend(torch.device("cpu"), name)
    assert str(caught.value) == f"`backend` {name}: unknown; known: {', '.join(BACKENDS)}"


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


@pytest.fixture
def nothing_logged() -> Iterator[None]:
    """Forgets, before and after the test, that the once-per-process note was logged."""
    kernels._log_missing.cache_clear()
    yield
    kernels._log_missing.cache_clear()


@pytest.fixture
def no_triton() -> str:
    """Why Triton does not work on CUDA here."""
    from moe_surgery.kernels.triton import availability

    why = availability()
    return pytest.skip("Triton works here") if why is None else why


@pytest.fixture
def no_extension(nothing_logged: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The extension cannot be imported."""
    monkeypatch.delitem(sys.modules, "moe_surgery._native", raising=False)
    monkeypatch.setitem(sys.modules, "moe_surgery._native", None)
    native._load.cache_clear()
    yield
    monkeypatch.undo()
    native._load.cache_clear()


def test_cuda_without_triton_is_plain_pytorch_and_a_warning(
    nothing_logged: None, no_triton: str, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        assert select_backend(torch.device("cuda")).name == "reference"
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [
        (
            logging.WARNING,
            f"backend reference (plain PyTorch, slower) on cuda, because triton does not work: {no_triton}; "
            "`backend` reference chooses it without this note",
        )
    ]


def test_what_was_asked_for_by_name_is_an_error_or_no_note(
    nothing_logged: None, no_triton: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("triton", "triton-invariant"):
        with pytest.raises(UsageError, match=f"`backend` triton: {re.escape(no_triton)}"):
            select_backend(torch.device("cuda"), name)
    assert select_backend(torch.device("cuda"), "reference").name == "reference"
    assert select_backend(torch.device("mps")).name == "reference"  # the only one there
    assert not caplog.records


GENERATE = ("generate", "example:tiny", "--prompt", "2+2=", "--max-new-tokens", "1")
NOTE = "backend reference (plain PyTorch, slower) on cpu, because native does not work: "


def test_a_command_without_the_extension_shows_a_note(
    no_extension: None, capsys: pytest.CaptureFixture[str]
) -> None:
    result = call(capsys, *GENERATE)
    assert result.code == 0
    [line] = [line for line in result.err.splitlines() if NOTE in line]
    assert line.startswith(f"note: {NOTE}not available (")
    assert not logging.getLogger("moe_surgery").handlers


def test_a_command_shows_what_was_asked_for_when_verbose(
    nothing_logged: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOE_SURGERY_NATIVE", "0")
    assert NOTE not in call(capsys, *GENERATE).err
    kernels._log_missing.cache_clear()
    assert f"{NOTE}disabled by MOE_SURGERY_NATIVE=0" in call(capsys, *GENERATE, "-v").err
