"""The native backend itself: when it is used, its threads, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from moe_surgery.errors import UsageError  # noqa: E402
from moe_surgery.kernels import select_backend  # noqa: E402
from moe_surgery.kernels.native import NativeBackend  # noqa: E402
from moe_surgery.kernels.reference import ReferenceBackend  # noqa: E402
from tests.kernels.brute_force import make_case  # noqa: E402
from tests.kernels.native_cases import (  # noqa: E402
    draw,
    native,
    needs_native,
)

pytestmark = needs_native

REFERENCE = ReferenceBackend()
# Sixteen bits of a block's largest value; sums in float32.
EXPERTS_ERROR = 1e-4
SUM_ERROR = 1e-6
THREADS = (1, 2, 3, 5)
STORED = (torch.bfloat16, torch.float16, torch.float32)


def test_calls_from_several_threads_take_turns() -> None:
    x, weight = draw(0, 5, 320), draw(1, 700, 320).bfloat16()
    expected, result = native("", 1).linear(x, weight), []

    def work() -> None:
        result.extend(native("", threads).linear(x, weight) for threads in (2, 3, 1, 5) * 10)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(result) == 160
    assert all(torch.equal(y, expected) for y in result)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own() -> None:
    program = """
import os, torch
from moe_surgery.kernels.native import NativeBackend
backend = NativeBackend(threads=3)
x, weight = torch.ones(2, 320), torch.ones(700, 320, dtype=torch.bfloat16)
before = backend.linear(x, weight)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(backend.linear(x, weight), before) else 1)
assert torch.equal(backend.linear(x, weight), before)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=120, cwd=root)


# --- choosing it


def test_the_cpu_takes_it_unless_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert select_backend(cpu).name == "native"
    assert select_backend(cpu, "reference").name == "reference"
    monkeypatch.setenv("MOE_SURGERY_NATIVE", "0")
    assert select_backend(cpu).name == "reference"
    with pytest.raises(UsageError, match="`backend` native: disabled by MOE_SURGERY_NATIVE=0"):
        select_backend(cpu, "native")


def test_it_is_refused_on_other_devices() -> None:
    with pytest.raises(UsageError, match="`backend` native: runs on the CPU, not on meta"):
        select_backend(torch.device("meta"), "native")
    with pytest.raises(UsageError, match="x is on meta, not on the CPU"):
        native().linear(torch.empty(1, 3, device="meta"), torch.ones(2, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize(("value", "threads"), [("3", 3), (" 1 ", 1), ("", None)])
def test_the_variable_sets_the_threads(
    value: str, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_SURGERY_THREADS", value)
    assert NativeBackend().threads == (threads or torch.get_num_threads())


@pytest.mark.parametrize("value", ["0", "-1", "two", "1025"])
def test_a_number_of_threads_that_is_none_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_SURGERY_THREADS", value)
    with pytest.raises(UsageError, match=f"MOE_SURGERY_THREADS={value}: must be a number from 1 to 1024"):
        NativeBackend()


def test_an_instruction_set_that_is_not_here_is_refused() -> None:
    with pytest.raises(UsageError, match="instruction set 'sse9' is not available here; available: "):
        NativeBackend("sse9")


def test_what_does_not_fit_is_refused() -> None:
    case = make_case()
    x, weights, ids = (torch.from_numpy(a) for a in (case.x, case.weights, case.ids))
    x, weights = x.float(), weights.float()
    backend = native()
    with pytest.raises(UsageError, match="x has shape"):
        backend.experts(x[:, :32], ids, weights, case.experts)
    with pytest.raises(UsageError, match="weights has shape"):
        backend.experts(x, ids, weights[:, :1], case.experts)
    with pytest.raises(ValueError, match="an id of an expert is not below 4"):
        backend.experts(x, ids + 4, weights, case.experts)
    with pytest.raises(UsageError, match="weight has shape"):
        backend.linear(x, torch.ones(3, 5, dtype=torch.bfloat16))
    with pytest.raises(UsageError, match="top_k 9 of 2 experts"):
        backend.route(x, torch.ones(2, 64, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16), 9)
