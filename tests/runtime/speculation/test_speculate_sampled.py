"""Sampled speculation draws whole continuations with the target's probabilities, not with the draft's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moe_surgery import Plan, load_model  # noqa: E402
from moe_surgery.runtime.model import CausalLM  # noqa: E402
from moe_surgery.runtime.sampling import Sampling  # noqa: E402
from moe_surgery.runtime.speculation.draft_length import AdaptiveLength, Costs  # noqa: E402
from moe_surgery.runtime.speculation.speculate import speculate  # noqa: E402
from moe_surgery.runtime.view import view  # noqa: E402
from tests.runtime.models import write_lively  # noqa: E402
from tests.runtime.speculation.support import sequence_probabilities  # noqa: E402
from tests.support.checkpoints import Shape  # noqa: E402
from tests.support.chi_square import critical  # noqa: E402

SHAPE = Shape(layers=2, experts=4, top_k=2, vocabulary=5)
PROMPT = [3, 1, 4]
NEW = 4
ROWS = 1000
FEWEST = 8.0  # expected in a cell of the test; rarer continuations are counted together


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    folder: Path = tmp_path_factory.mktemp("sampled") / "model"
    return load_model(write_lively(folder, SHAPE), dtype=torch.float32)


@pytest.fixture(scope="module")
def draft(target: CausalLM) -> CausalLM:
    return view(target, Plan("gpt_oss", SHAPE.experts, ((0, 3), (2,))), 1)


def chi_square(counts: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """The statistic and its degrees of freedom, rare cells taken together."""
    rare = expected < FEWEST
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    some = wanted > 0
    assert (observed[~some] == 0).all()
    return float(((observed - wanted)[some] ** 2 / wanted[some]).sum()), int(some.sum()) - 1


CASES = {
    "one": (1, Sampling(1.0, seed=1)),
    "more than are left": (6, Sampling(1.0, seed=3)),
    "cold": (2, Sampling(0.6, seed=4)),
    "hot": (3, Sampling(1.7, seed=5)),
    "top-p": (3, Sampling(1.0, top_p=0.85, seed=7)),
    "min-p": (1, Sampling(1.0, min_p=0.15, seed=8)),
    "all filters": (2, Sampling(0.9, 4, 0.95, 0.02, seed=9)),
    "adaptive": (AdaptiveLength(max_length=3, confidence=0.4), Sampling(1.0, seed=10)),
    "adaptive by cost": (
        AdaptiveLength(max_length=3, confidence=0.3, memory=0.3, costs=Costs(0.2, [1.0, 1.1, 1.2, 1.3])),
        Sampling(0.8, top_p=0.9, seed=11),
    ),
}


@pytest.mark.parametrize("runs", [3, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("length", "sampling"), CASES.values(), ids=CASES)
def test_continuations_come_as_often_as_the_target_draws_them(
    target: CausalLM, draft: CausalLM, length: int | AdaptiveLength, sampling: Sampling, runs: int
) -> None:
    counts = np.zeros([SHAPE.vocabulary] * NEW)
    accepted = tried = 0
    for number in range(runs):
        seeded = Sampling(
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.min_p,
            1000 * number + (sampling.seed or 0),
        )
        result = speculate(
            target,
            draft,
            [PROMPT] * ROWS,
            draft_length=length,
            sampling=seeded,
            max_new_tokens=NEW,
            stop_tokens=(),
        )
        np.add.at(counts, tuple(np.array(result.tokens).T), 1)
        accepted += sum(result.statistics.accepted)
        tried += sum(result.statistics.tried)
    assert 0.05 * tried < accepted < 0.97 * tried  # the rule had something to do
    expected = sequence_probabilities(target, PROMPT, NEW, sampling) * ROWS * runs
    statistic, freedom = chi_square(counts, expected)
    assert freedom >= 10
    assert statistic < critical(freedom)
    # The same test tells the draft's own distribution apart.
    other = sequence_probabilities(draft, PROMPT, NEW, sampling) * ROWS * runs
    rare = other < FEWEST
    wrong = np.append(other[~rare], other[rare].sum())
    seen = np.append(counts[~rare], counts[rare].sum())
    assert ((seen - wrong)[wrong > 0] ** 2 / wrong[wrong > 0]).sum() > 3 * critical(len(wrong))


def test_an_identical_draft_is_accepted_whole(target: CausalLM) -> None:
    result = speculate(
        target,
        target,
        [PROMPT] * 50,
        draft_length=4,
        sampling=Sampling(1.0, seed=0),
        max_new_tokens=30,
        stop_tokens=(),
    )
    assert result.statistics.acceptance == pytest.approx(1, abs=1e-3)  # float32 sums differ in the last bit
