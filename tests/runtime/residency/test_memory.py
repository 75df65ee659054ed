"""A limit on memory: what is left for experts, and what is said where it is too small."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moe_surgery import Plan, inspect, load_model  # noqa: E402
from moe_surgery.errors import CheckpointWarning, PlanMismatchError, UsageError  # noqa: E402
from moe_surgery.runtime.residency import memory  # noqa: E402
from moe_surgery.runtime.residency.model import ResidentCausalLM  # noqa: E402
from moe_surgery.selection.statistics import ExpertStatistics, Statistics, save_statistics  # noqa: E402
from tests.runtime.residency.conftest import load_resident  # noqa: E402

TINY = "example:tiny"


def test_too_small_a_limit_names_the_least_and_the_least_is_enough() -> None:
    with pytest.raises(UsageError, match=r"`memory` 0\.0 GB: this model needs at least") as error:
        load_model(TINY, memory="1MB")
    least = re.search(r"at least ([0-9.]+) GB", str(error.value))
    assert least
    model = load_model(TINY, memory=f"{float(least[1]) + 0.1:.1f}GB")  # the process grows in between
    assert isinstance(model, ResidentCausalLM)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "much"}, "`memory` 'much' is not a size"),
        ({"memory": 0}, "`memory` 0: must be at least 1 byte"),
        ({"residency": "plan.json"}, "`residency` needs `memory`"),
        ({"memory": "1TB", "one_layer": True}, "choose one of `memory` and `one_layer`"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_model(TINY, **options)  # type: ignore[arg-type]


def test_a_cache_takes_memory_from_the_experts_and_gives_it_back() -> None:
    model = load_resident(TINY)
    slots = 20
    model.budget.limit = model.budget._fixed + slots * model.budget.slot
    model.pool.resize(model.budget.slots)
    assert model.pool.capacity == slots
    cache = model.new_cache(1, 512)
    assert 0 < slots - model.pool.capacity == -(-cache.nbytes // model.budget.slot)
    model(torch.arange(20)[None], cache)
    del cache
    gc.collect()
    assert model.pool.capacity == slots
    with pytest.raises(UsageError, match="a cache of 900 x 512 tokens needs at least"):
        model.new_cache(900, 512)
    assert model.pool.capacity == slots


def test_a_long_step_borrows_memory() -> None:
    model = load_resident(TINY)
    budget = model.budget
    budget.limit = budget._fixed + 40 * budget.slot
    model.pool.resize(budget.slots)
    with budget.borrowed(memory.STEP_TOKENS, model.pool):
        assert model.pool.capacity == 40
    tokens = memory.STEP_TOKENS + 3 * budget.slot // budget.token
    with budget.borrowed(tokens, model.pool):
        assert model.pool.capacity == 37
    assert model.pool.capacity == 40


def test_statistics_and_plans_say_what_is_held_first(tmp_path: Path) -> None:
    model = inspect(TINY)
    kept = tuple((n, 31 - n) for n in range(model.layers))
    counts = np.zeros((model.layers, model.experts), np.int64)
    for layer, experts in enumerate(kept):
        counts[layer, list(experts)] = 7
    statistics = Statistics(model.model_type, None, model.experts, 160, 4, {"text": 14})
    statistics.texts["text"] = []
    statistics.data["text"] = [ExpertStatistics(row) for row in counts]
    save_statistics(statistics, tmp_path / "statistics.safetensors")
    for start in (
        tmp_path / "statistics.safetensors",
        statistics,
        Plan(model.model_type, model.experts, kept),
    ):
        loaded = load_resident(TINY, residency=start)
        while len(loaded.pool.resident) < 8:
            pass
        assert loaded.pool.resident == {(n, e) for n, experts in enumerate(kept) for e in experts}


def test_what_is_of_another_model_is_refused() -> None:
    with pytest.raises(PlanMismatchError, match="the plan is for"):
        load_model(TINY, memory="1TB", residency=Plan("gpt_oss", 4, ((0,), (1,))))
    with pytest.raises(PlanMismatchError, match="the statistics are of 0 layers of 8 experts"):
        load_model(TINY, memory="1TB", residency=Statistics("gpt_oss", None, 8, 160, 4))


def test_a_model_that_does_not_fit_what_is_free_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(TINY)
    monkeypatch.setattr(memory, "available_memory", lambda: 1_000_000)
    with pytest.warns(
        CheckpointWarning, match=r"weights of 0.0 GB, 0.0 GB of memory are free: .* `memory` it is planned"
    ):
        load_model(TINY)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs Linux")
def test_available_memory_is_at_most_what_the_machine_has() -> None:
    available = memory.available_memory()
    assert available is not None
    assert 0 < available <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_the_process_stays_below_its_limit() -> None:
    """In a process of its own: the peak that the kernel keeps is never above the limit."""
    script = """
import torch
from moe_surgery import generate, load_model
from moe_surgery.runtime.usage import peak_memory, process_memory
import moe_surgery.runtime.residency.weights
limit = process_memory() + (110 << 20)
model = load_model("example:tiny", memory=limit)
assert model.budget.slots < 128, model.budget
generate(model, [list(range(300))], max_new_tokens=20, stop_tokens=())
print(limit - peak_memory(torch.device("cpu")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
