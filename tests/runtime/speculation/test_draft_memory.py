"""What a draft that is a view adds to memory: its router's rows, an index, and a cache of the size stated."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from types import FunctionType, MethodType, ModuleType

import pytest

torch = pytest.importorskip("torch")

from moe_surgery import Plan, inspect, load_model, plan_random  # noqa: E402
from moe_surgery.runtime.cache import Cache  # noqa: E402
from moe_surgery.runtime.model import CausalLM  # noqa: E402
from moe_surgery.runtime.speculation.speculate import Speculation, speculate, speculation_cache_bytes  # noqa: E402
from moe_surgery.runtime.view import view  # noqa: E402
from tests.runtime.models import write_lively  # noqa: E402
from tests.support.checkpoints import Shape, load_tensors  # noqa: E402

Storages = dict[int, int]  # bytes by address


def storages(value: object) -> Storages:
    """Of every tensor that `value` holds, however deep."""
    result, seen, waiting = {}, set(), [value]
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, type | ModuleType | FunctionType | MethodType):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            result[storage.data_ptr()] = storage.nbytes()
        else:
            waiting += gc.get_referents(one)
    return result


def added(draft: CausalLM, target: CausalLM) -> int:
    """Bytes of the storages that `draft` holds and `target` does not."""
    known = storages(target)
    return sum(nbytes for place, nbytes in storages(draft).items() if place not in known)


def weights_of(folder: Path) -> int:
    """Bytes of all tensors in its files."""
    return sum(tensor.nbytes for tensor in load_tensors(folder).values())


@pytest.mark.parametrize("kept", [1, 8, 31, None])
@pytest.mark.parametrize("top_k", [None, 1])
def test_a_view_adds_router_rows_and_an_index_alone(
    tiny: Path, tiny_model: CausalLM, kept: int | None, top_k: int | None
) -> None:
    assert sum(storages(tiny_model).values()) >= weights_of(tiny)  # so that a copy could not be missed
    draft = view(tiny_model, None if kept is None else plan_random(kept, 0, inspect(tiny)), top_k)
    c = json.loads((tiny / "config.json").read_text())
    row = 2 * c["hidden_size"] + 2 + 8  # BF16 weights and a bias, the expert's number
    expected = c["num_hidden_layers"] * (kept or 0) * row
    assert added(draft, tiny_model) == expected
    speculate(tiny_model, draft, [[5, 6, 7]], draft_length=3, max_new_tokens=9, stop_tokens=())
    assert added(draft, tiny_model) == expected


def test_a_draft_loaded_beside_the_target_is_not_free(tiny: Path, tiny_model: CausalLM) -> None:
    """The count can fail: the same checkpoint opened again is other memory."""
    again = load_model(tiny, dtype=torch.float32, backend=tiny_model.backend.name)
    assert added(again, tiny_model) >= weights_of(tiny)


# --- as the kernel counts it

MEASURE = """
import json, sys
from pathlib import Path
import torch
from moe_surgery import Plan, load_model
from moe_surgery.runtime.generate import generate
from moe_surgery.runtime.speculation.speculate import speculate
from moe_surgery.runtime.view import view

folder, backend, plans = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])

def held():
    status = Path("/proc/self/status").read_text().splitlines()
    anonymous = next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
    return anonymous, Path("/proc/self/maps").read_text().count(".safetensors")

def speculating(draft):
    speculate(target, draft, prompts, draft_length=2, max_new_tokens=4, stop_tokens=())

torch.set_num_threads(1)
target = load_model(folder, dtype=torch.float32, backend=backend)
prompts = [[1, 2], [3]]
generate(target, prompts, max_new_tokens=4, stop_tokens=())
speculating(target)  # what a run takes besides weights is there from now on
before = held()
drafts = [view(target, Plan("gpt_oss", len(plan[0]) * 2, tuple(map(tuple, plan)))) for plan in plans]
for draft in drafts:
    speculating(draft)
after = held()
shards = [file.read_bytes() for file in Path(folder).glob("*.safetensors")]
print(json.dumps({"before": before, "after": after, "with a copy": held()}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_drafting_with_views_takes_no_memory_for_weights(backend: str, tmp_path: Path) -> None:
    shape = Shape(layers=2, experts=32, top_k=2, hidden=512, intermediate=512, vocabulary=40)
    folder = write_lively(tmp_path / "model", shape)
    weights = weights_of(folder)
    assert weights > 25e6
    plans = [[list(range(start, start + 16))] * 2 for start in (0, 8, 16)]
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    given_back = {
        "MALLOC_MMAP_THRESHOLD_": "65536"
    }  # what is freed leaves the process, whatever lies after it
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), backend, json.dumps(plans)],
        capture_output=True,
        text=True,
        env={**os.environ, **path, **given_back},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    (before, maps), (after, maps_after), (copied, _) = result.values()
    assert after - before < weights / 4  # three drafts together
    assert maps_after == maps
    assert copied - after > weights * 0.9  # a copy of the weights does show


# --- caches


@pytest.mark.parametrize(("dtype", "backend_name"), [(torch.float32, None), (torch.bfloat16, "reference")])
@pytest.mark.parametrize("batch", [1, 3])
def test_caches_take_what_is_stated(
    tiny: Path, dtype: torch.dtype, backend_name: str | None, batch: int
) -> None:
    length, new = 4, 30
    target = load_model(tiny, dtype=dtype, backend=backend_name)
    draft = view(target, Plan("gpt_oss", 32, ((0, 3, 9),) * 4))
    prompts = [[token] * n for token, n in zip((3, 4, 5), (70, 9, 30), strict=True)][:batch]
    gc.collect()
    others = caches()
    run = Speculation(target, draft, prompts, draft_length=length, max_new_tokens=new, stop_tokens=())
    for _ in zip(run, range(3), strict=False):  # the prompts, and two rounds
        pass
    held = sorted(sum(storages([c.keys, c.values]).values()) for c in caches() if c not in others)
    c = json.loads((tiny / "config.json").read_text())
    windows = [c["sliding_window"] if kind == "sliding_attention" else None for kind in c["layer_types"]]
    assert set(windows) == {64, None}
    tokens = 70 + new - 1 + length  # the last token is not looked at again, drafted ones lie beyond

    def expected(rollback: int) -> int:
        slots = sum(tokens if w is None else min(tokens, w + rollback) for w in windows)
        return 2 * batch * slots * c["num_key_value_heads"] * c["head_dim"] * dtype.itemsize

    stated = [expected(length), expected(length + 2)]  # the draft may be two tokens behind
    assert held == stated
    assert [run.statistics.target_cache_bytes, run.statistics.draft_cache_bytes] == stated
    assert list(speculation_cache_bytes(target, draft, batch, 70 + new, length)) == stated


def caches() -> list[Cache]:
    """All that exist."""
    return [one for one in gc.get_objects() if type(one) is Cache]
