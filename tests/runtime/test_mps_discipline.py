"""The runtime stays within what PyTorch offers on Apple's GPUs, where these tests cannot run.

Every operator of loading, prefill, decode and sampling must have a kernel for MPS in the table that
torch is generated from, and every tensor a dtype that MPS has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
yaml = pytest.importorskip("yaml")
torchgen = pytest.importorskip("torchgen")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from moe_surgery import Plan, load_model  # noqa: E402
from moe_surgery.kernels.interface import Backend  # noqa: E402
from moe_surgery.kernels.reference import ReferenceBackend  # noqa: E402
from moe_surgery.kernels.reference.experts import experts_gathered, experts_grouped  # noqa: E402
from moe_surgery.quality.loss import cross_entropy  # noqa: E402
from moe_surgery.runtime.sampling import Sampler, Sampling  # noqa: E402
from tests.runtime.conftest import SMALL  # noqa: E402
from tests.runtime.models import write_lively  # noqa: E402

TABLE = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
DTYPES = {
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
}
# They have a kernel for MPS now, but none in torch 2.6, the oldest version supported.
TOO_NEW = {
    "angle",
    "erfc",
    "gcd",
    "index_copy",
    "index_copy_",
    "index_reduce",
    "index_reduce_",
    "isin",
    "kthvalue",
    "lcm",
    "nanmedian",
    "nonzero_static",
    "unique_dim",
}
COMPOSITE = (
    "CompositeImplicitAutograd",
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
)


@lru_cache
def kernels() -> dict[str, frozenset[str]]:
    """For each operator ("name.overload") the dispatch keys that have a kernel of it."""
    entries = {e["func"].split("(")[0]: e for e in yaml.safe_load(TABLE.read_text())}

    def keys(name: str) -> frozenset[str]:
        entry = entries[name]
        if "structured_delegate" in entry:
            return keys(entry["structured_delegate"])
        dispatch = entry.get("dispatch", {"CompositeImplicitAutograd": name})
        return frozenset(key.strip() for joined in dispatch for key in joined.split(","))

    return {name: keys(name) for name in entries}


class OnlyMps(TorchDispatchMode):
    """Refuses operators and dtypes that MPS lacks; `used` are the operators that passed.

    An operator made of others passes if those do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.used: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, overload = func._schema.name.removeprefix("aten::"), func._schema.overload_name
        known = kernels().get(f"{name}.{overload}" if overload else name, frozenset())
        made_of_others = [key for key in COMPOSITE if key in known]
        if name in TOO_NEW or not (made_of_others or "MPS" in known):
            raise NotImplementedError(f"{func} is not implemented for MPS")
        if "MPS" in known:
            args = tuple(map(as_declared, args, func._schema.arguments))
            out = func(*args, **(kwargs or {}))
        else:
            with self:
                out = func._op_dk(getattr(torch._C.DispatchKey, made_of_others[0]), *args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor) and leaf.dtype not in DTYPES:
                raise TypeError(f"{func}: MPS has no {leaf.dtype}")
        self.used.add(str(func))
        return out


def as_declared(value: Any, argument: Any) -> Any:
    """A number that was passed for a tensor, as one that does not widen the result."""
    if isinstance(value, int | float) and str(argument.type) == "Tensor":
        return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float32)
    return value


class Gathered(ReferenceBackend):
    """The way that devices take for a few tokens, for any number of them."""

    def experts(self, x: Any, ids: Any, weights: Any, expert_weights: Any) -> Any:
        return experts_gathered(x, ids, weights, expert_weights)


class Grouped(ReferenceBackend):
    def experts(self, x: Any, ids: Any, weights: Any, expert_weights: Any) -> Any:
        return experts_grouped(x, ids, weights, expert_weights)


@pytest.fixture
def guard() -> Iterator[OnlyMps]:
    # Tables made once per dtype and device are built on the CPU and moved.
    with OnlyMps() as mode:
        yield mode


@pytest.fixture(scope="module", params=["mxfp4", "bf16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lively(tmp_path_factory.mktemp("mps") / request.param, SMALL, request.param)


PLAN = Plan("gpt_oss", SMALL.experts, ((4, 0), (1, 2), (3, 2)))


# Every dtype with both backends, in turn with and without a plan; the rest is slow.
@pytest.mark.parametrize(
    ("dtype", "backend", "plan"),
    [
        pytest.param(dtype, backend, plan, marks=[pytest.mark.slow] if (i + j + k) % 2 else [])
        for i, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16))
        for j, backend in enumerate((Gathered, Grouped))
        for k, plan in enumerate((None, PLAN))
    ],
)
def test_loading_and_running_ask_only_for_what_mps_has(
    folder: Path, dtype: torch.dtype, backend: Callable[[], Backend], plan: Plan | None, guard: OnlyMps
) -> None:
    model = load_model(folder, dtype=dtype, plan=plan)
    model.backend = backend()
    ids = torch.arange(24).view(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    cache = model.new_cache(2, 40, rollback=4)
    logits = model(ids, cache, mask, logits_to_keep=1)
    for sampling in (Sampling(), Sampling(0.7, top_k=10, top_p=0.9, min_p=0.01, seed=0)):
        tokens, _ = Sampler(sampling)(logits[:, -1])
        logits = model(tokens[:, None], cache)
    cache.truncate(cache.length - 2)
    assert model(tokens[:, None], cache).isfinite().all()
    assert cross_entropy(model, range(20)) > 0
    assert {"aten.sort.stable", "aten._log_softmax.default", "aten.searchsorted.Tensor"} <= guard.used


FORBIDDEN: dict[str, Callable[[], object]] = {
    "float64": lambda: torch.zeros(3, dtype=torch.float64),
    "a float64 in passing": lambda: torch.ones(3).double().float(),
    "complex": lambda: torch.view_as_complex(torch.ones(3, 2)),
    "uint16": lambda: torch.zeros(3, dtype=torch.uint16),
    "uint32": lambda: torch.zeros(3, dtype=torch.uint32),
    "an operator without a kernel": lambda: torch.linalg.eigvals(torch.eye(3)),
    "an operator newer than 2.6": lambda: torch.zeros(3).index_copy_(0, torch.tensor([1]), torch.ones(1)),
    "an operator made of others, one without": lambda: torch.isin(torch.ones(3), torch.ones(2)),
}


@pytest.mark.parametrize("forbidden", FORBIDDEN.values(), ids=FORBIDDEN)
def test_the_guard_refuses_what_mps_lacks(forbidden: Callable[[], object], guard: OnlyMps) -> None:
    with pytest.raises((NotImplementedError, TypeError), match="MPS"):
        forbidden()
