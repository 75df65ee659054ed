"""The runtime computes what transformers computes, to rounding.

float32 has to agree closely. bfloat16 is held against float32 and may err hardly more than
transformers' own bfloat16 does. Where the router has a choice, rounding now and then flips it, for
either of the two at its own places, and such a token's error outweighs hundreds of others: so that
error is compared by the median token, and by norm where every expert is always chosen.
"""

from __future__ import annotations

import inspect
import random
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from moe_surgery import load_model, plan_random, prune  # noqa: E402
from moe_surgery.runtime.text import Text  # noqa: E402
from tests.runtime.models import write_lively  # noqa: E402
from tests.support import oracle  # noqa: E402
from tests.support.checkpoints import LAYOUTS, Shape  # noqa: E402
from tests.support.sums import arithmetic  # noqa: E402

COUNTS = (32, 31, 5, 1)
TOP_K, WINDOW, ORIGINAL_LENGTH = 4, 64, 512
# Of float32 logits, whose largest are about 24. The native backend rounds activations to 16 bits of a block's
# largest, which now and then sends a token to another expert where the router hardly prefers one, and tokens after
# it see that: it is held by the median token, and by norm over all inputs together.
TOLERANCE = {"reference": 4e-4, "native": 2e-3}
NORM_TOLERANCE = {"reference": 1e-5, "native": 3.3e-3}
NO_WORSE = 1.2


@dataclass
class Theirs:
    """A checkpoint and transformers' logits by input name: float32 and bfloat16."""

    folder: Path
    exact: dict[str, torch.Tensor]
    rounded: dict[str, torch.Tensor]


@dataclass
class Compared:
    """Logits of one checkpoint by input name: float32 and bfloat16, transformers' and ours."""

    experts: int
    backend: str
    exact: dict[str, torch.Tensor]
    exact_ours: dict[str, torch.Tensor]
    rounded: dict[str, torch.Tensor]
    rounded_ours: dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def inputs(tiny_text: Text) -> dict[str, torch.Tensor]:
    """Token ids [batch, tokens]."""
    sums = tiny_text.encode(arithmetic(random.Random(0), 1600))
    code = tiny_text.encode(inspect.getsource(textwrap))
    result = {
        "sums": torch.tensor([sums[:560]]),
        "code": torch.tensor([code[:200]]),
        "code, later": torch.tensor([code[600:800], code[900:1100]]),
        "random": torch.randint(0, 2048, (2, 100), generator=torch.Generator().manual_seed(1)),
    }
    assert all(ids.shape[1] > WINDOW for ids in result.values())
    assert max(ids.shape[1] for ids in result.values()) > ORIGINAL_LENGTH
    return result


@pytest.fixture(scope="module")
def theirs(
    tiny: Path, inputs: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Theirs]:
    """By number of experts; computed once for all backends."""

    @cache
    def of(count: int) -> Theirs:
        folder = tiny
        if count < COUNTS[0]:
            folder = tmp_path_factory.mktemp("pruned") / str(count)
            prune(tiny, folder, lambda model: plan_random(count, count, model))
        models = [oracle.load_model(folder, dtype) for dtype in (torch.float32, torch.bfloat16)]
        logits = [{n: oracle.logits_of(model, ids).float() for n, ids in inputs.items()} for model in models]
        return Theirs(folder, *logits)

    return of


@pytest.mark.parametrize("count", [n if n != 31 else pytest.param(n, marks=pytest.mark.slow) for n in COUNTS])
def test_the_embedded_model_and_what_is_left_of_it(
    count: int, backend: str, theirs: Callable[[int], Theirs], inputs: dict[str, torch.Tensor]
) -> None:
    compared = compare(theirs(count), inputs, backend)
    assert compared.experts == count
    check_that_float32_agrees(compared)
    check_that_bfloat16_errs_hardly_more(compared)
    check_that_bfloat16_says_the_same_where_errors_leave_no_doubt(compared)


def compare(theirs: Theirs, inputs: dict[str, torch.Tensor], backend: str) -> Compared:
    exact_ours, rounded_ours = (
        load_model(theirs.folder, dtype=dtype, backend=backend) for dtype in (torch.float32, torch.bfloat16)
    )
    return Compared(
        exact_ours.config.num_local_experts,
        backend,
        theirs.exact,
        {name: exact_ours(ids) for name, ids in inputs.items()},
        theirs.rounded,
        {name: rounded_ours(ids) for name, ids in inputs.items()},
    )


def check_that_float32_agrees(compared: Compared) -> None:
    for name, expected in compared.exact.items():
        assert expected.std() > 0.5, name
        result, tolerance = compared.exact_ours[name], TOLERANCE[compared.backend]
        worst = (result - expected).abs().amax(dim=-1).flatten()  # of each token
        most = worst.max() if compared.backend == "reference" else worst.median()
        assert most <= tolerance, name
    errors = [(compared.exact_ours[n] - x).norm() for n, x in compared.exact.items()]
    norms = [x.norm() for x in compared.exact.values()]
    assert torch.stack(errors).norm() <= NORM_TOLERANCE[compared.backend] * torch.stack(norms).norm()


def check_that_bfloat16_errs_hardly_more(compared: Compared) -> None:
    """Over all inputs together by norm, and at the median token of each.

    On one input the norm may go either way: where router logits nearly tie, rounding sends a token
    to another expert in one run and not in the other.
    """
    errors_theirs = [(compared.rounded[n] - x).norm() for n, x in compared.exact.items()]
    errors_ours = [(compared.rounded_ours[n] - x).norm() for n, x in compared.exact.items()]
    assert torch.stack(errors_ours).norm() <= NO_WORSE * torch.stack(errors_theirs).norm()
    for name, exact in compared.exact.items():
        expected = (compared.rounded[name] - exact).norm(dim=-1).flatten()
        ours = (compared.rounded_ours[name] - exact).norm(dim=-1).flatten()
        assert ours.median() <= NO_WORSE * expected.median(), name
        if compared.experts <= TOP_K:
            assert ours.norm() <= NO_WORSE * expected.norm(), name


def check_that_bfloat16_says_the_same_where_errors_leave_no_doubt(compared: Compared) -> None:
    checked = 0
    for name, exact in compared.exact.items():
        first, second = exact.topk(2, dim=-1).values.unbind(-1)
        certain = first - second > 2 * (compared.rounded_ours[name] - exact).abs().max()
        same = compared.rounded_ours[name].argmax(-1) == exact.argmax(-1)
        assert same[certain].all(), name
        checked += int(certain.sum())
    assert checked > 100


ODD_SHAPES = {
    "one expert": Shape(experts=1, top_k=1, hidden=96, intermediate=160, heads=6, kv_heads=3),
    "every expert chosen": Shape(experts=3, top_k=3, hidden=224, intermediate=96, heads=5, kv_heads=1),
    "a key head for each query head": Shape(hidden=160, intermediate=32, heads=3, kv_heads=3, head_dim=6),
    "one layer": Shape(layers=1, hidden=32, intermediate=288, head_dim=64),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ODD_SHAPES.values(), ids=ODD_SHAPES)
def test_every_layout_of_every_shape_gives_transformers_logits(
    shape: Shape, layout: str, backend: str, tmp_path: Path
) -> None:
    # transformers reads the hub's layouts; the same seed makes the same weights in all of them.
    theirs = oracle.load_model(write_lively(tmp_path / "hub", shape, seed=3))
    folder = write_lively(tmp_path / "own", shape, layout, seed=3, shards=2)
    ids = torch.randint(0, shape.vocabulary, (2, 70), generator=torch.Generator().manual_seed(0))
    expected = oracle.logits_of(theirs, ids)
    assert expected.std() > 0.3
    got = load_model(folder, dtype=torch.float32, backend=backend)(ids)
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE[backend])
