"""Choosing by reconstruction against plain loops that route and add up anew for every candidate."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from moe_surgery import load_model, load_plan, load_ranking  # noqa: E402
from moe_surgery.checkpoint.resolve import resolve  # noqa: E402
from moe_surgery.progress import Progress  # noqa: E402
from moe_surgery.quality.corpus import Passage, text_files  # noqa: E402
from moe_surgery.quality.greedy_elimination import eliminate, greedy_elimination  # noqa: E402
from moe_surgery.quality.routing import Routing  # noqa: E402
from moe_surgery.quality.search import search  # noqa: E402
from moe_surgery.runtime.text import Text  # noqa: E402
from tests.support import oracle  # noqa: E402
from tests.support.command import call  # noqa: E402
from tests.support.sums import arithmetic  # noqa: E402

TINY = "example:tiny"


@dataclass(frozen=True)
class Rule:
    """A router by its scores; see `Routing`."""

    top_k: int
    softmax: bool = True
    renormalised: bool = True
    bias: tuple[float, ...] = (0.0,) * 9

    def output(self, logits: np.ndarray, outputs: np.ndarray, left: list[int]) -> np.ndarray:
        """A layer's output for one token with the experts `left`, float64."""
        scores = np.exp(logits) if self.softmax else 1 / (1 + np.exp(-logits))
        if self.softmax:
            scores = scores / scores[left].sum()
        chosen = sorted(left, key=lambda e: -(scores[e] + self.bias[e]))[: self.top_k]
        weights = scores[chosen] / (scores[chosen].sum() if self.renormalised else 1)
        return 1.5 * weights @ outputs[chosen]


def cost_of(logits: np.ndarray, outputs: np.ndarray, norms: np.ndarray, left: list[int], rule: Rule) -> float:
    everyone = list(range(logits.shape[1]))
    total = 0.0
    for z, f, norm in zip(logits, outputs, norms, strict=True):
        change = rule.output(z, f, left) - rule.output(z, f, everyone)
        total += float(change @ change) / norm
    return total / len(logits)


def by_hand(
    logits: np.ndarray, outputs: np.ndarray, norms: np.ndarray, rule: Rule
) -> tuple[list[int], list[float]]:
    left, dropped, errors = list(range(logits.shape[1])), [], [0.0]
    while len(left) > 1:
        costs = [cost_of(logits, outputs, norms, [x for x in left if x != e], rule) for e in left]
        worst = left[int(np.argmin(costs))]
        left.remove(worst)
        dropped.append(worst)
        errors.append(min(costs))
    return [left[0], *dropped[::-1]], errors[::-1]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 30),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 5),
    softmax=st.booleans(),
    renormalised=st.booleans(),
    biased=st.booleans(),
)
def test_elimination_is_greedy_over_exact_costs(
    seed: int, tokens: int, experts: int, top_k: int, softmax: bool, renormalised: bool, biased: bool
) -> None:
    rng = np.random.default_rng(seed)
    logits, outputs = rng.normal(size=(tokens, experts)), rng.normal(size=(tokens, experts, 6))
    norms = rng.uniform(0.5, 2, size=tokens)
    top_k = min(top_k, experts)
    gram = np.einsum("teh,tfh->tef", outputs, outputs)
    bias = tuple(rng.uniform(0, 0.5, experts)) if biased else (0.0,) * experts
    rule = Rule(top_k, softmax, renormalised, bias)
    scores = torch.softmax(torch.tensor(logits), dim=1) if softmax else torch.tensor(logits).sigmoid()
    added = torch.tensor(bias).float() if biased else None
    routing = Routing(scores.float(), top_k, added, softmax, renormalised, 1.5)
    result = eliminate(routing, torch.tensor(gram).float(), torch.tensor(norms).float())
    experts_by_hand, errors = by_hand(logits, outputs, norms, rule)
    # An order may differ where two experts harm alike to float32's eye; what is reached may not.
    for n in range(1, experts + 1):
        reached = cost_of(logits, outputs, norms, list(result.experts[:n]), rule)
        assert result.errors[n - 1] == pytest.approx(reached, rel=1e-3, abs=1e-6)
    if not routing.fixed_order:
        return  # candidates are compared by the tokens that go to them
    if experts_by_hand == list(result.experts):
        assert result.errors == pytest.approx(errors, rel=1e-3, abs=1e-6)
    else:
        first = next(n for n in range(experts, 0, -1) if set(result.experts[:n]) != set(experts_by_hand[:n]))
        assert result.errors[first - 1] == pytest.approx(errors[first - 1], rel=1e-3, abs=1e-6)


@pytest.fixture(scope="module")
def passages() -> list[Passage]:
    text = Text(TINY)
    return [Passage("sums", tuple(text.encode(arithmetic(random.Random(i), 200))[:60])) for i in range(2)]


def test_a_layers_errors_are_those_of_transformers_with_masked_routers(passages: list[Passage]) -> None:
    """The last layer: what comes before it is the full model either way."""
    result = greedy_elimination(load_model(TINY, dtype=torch.float32, backend="reference"), passages)[-1]
    model = oracle.load_model(resolve(TINY), torch.float32)
    seen: list[torch.Tensor] = []
    model.model.layers[-1].register_forward_hook(
        lambda _m, _i, out: seen.append(out if isinstance(out, torch.Tensor) else out[0])
    )

    def hidden(kept: list[int] | None) -> list[np.ndarray]:
        seen.clear()
        router = model.model.layers[-1].mlp.router
        bias, top_k = router.bias.detach().clone(), router.top_k
        if kept is not None:
            dropped = torch.ones(32, dtype=torch.bool)
            dropped[kept] = False
            router.bias.data[dropped] = -torch.inf
            router.top_k = min(top_k, len(kept))
        with torch.no_grad():
            for passage in passages:
                model(torch.tensor([passage.tokens]))
        router.bias.data.copy_(bias)
        router.top_k = top_k
        return [h.reshape(-1, 160).double().numpy() for h in seen]

    full = np.concatenate(hidden(None))
    for n in (1, 3, 8, 20):
        less = np.concatenate(hidden(list(result.experts[:n])))
        errors = ((less - full) ** 2).sum(axis=1) / (full**2).sum(axis=1)
        assert result.errors[n - 1] == pytest.approx(errors.mean(), rel=2e-3)
    assert list(result.errors) == sorted(result.errors, reverse=True) or result.errors[-1] == 0
    assert sorted(result.experts) == list(range(32))


class Stop(Exception):
    pass


def test_an_interrupted_search_resumes_and_gives_the_same_file(tmp_path: Path) -> None:
    text = tmp_path / "sums.txt"
    text.write_text(arithmetic(random.Random(3), 400))
    files = text_files([text])
    search(TINY, files, tmp_path / "whole.json")

    def stop_after_two(progress: Progress) -> None:
        if 4 * progress.done >= progress.total:  # after two of four layers
            raise Stop

    with pytest.raises(Stop):
        search(TINY, files, tmp_path / "r.json", progress=stop_after_two)
    assert not (tmp_path / "r.json").exists()
    resumed: list[Progress] = []
    search(TINY, files, tmp_path / "r.json", progress=resumed.append)
    total = resumed[-1].total
    assert resumed == [Progress("search", total * done // 4, total, "tokens") for done in (2, 3, 4)]
    assert (tmp_path / "r.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.json", "sums.txt", "whole.json"]


def test_what_another_backend_left_is_not_used(tmp_path: Path) -> None:
    text = tmp_path / "sums.txt"
    text.write_text(arithmetic(random.Random(3), 200))
    files = text_files([text])

    def stop(progress: Progress) -> None:
        if progress.done:
            raise Stop

    with pytest.raises(Stop):
        search(TINY, files, tmp_path / "r.json", max_tokens=20, dtype=torch.float32, progress=stop)
    assert (tmp_path / ".r.json.partial").exists()
    layers: list[Progress] = []
    options = {"max_tokens": 20, "dtype": torch.float32, "backend": "reference-invariant"}
    search(TINY, files, tmp_path / "r.json", progress=layers.append, **options)  # type: ignore[arg-type]
    assert [p.done for p in layers] == [0, 5, 10, 15, 20]


def test_the_command_makes_a_ranking_that_plan_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "sums.txt"
    text.write_text(arithmetic(random.Random(4), 300))
    output = call(capsys, "search", TINY, "--texts", text, "-o", tmp_path / "r.json", "--json")
    assert output.code == 0, output.err
    ranking = load_ranking(tmp_path / "r.json")
    assert output.json()["layers"] == [list(row) for row in ranking.layers]
    assert ranking.provenance["method"] == "reconstruction"
    assert (
        json.loads((tmp_path / "r.json").read_text())["provenance"]["texts"]["sums"][0]["name"] == "sums.txt"
    )
    assert call(capsys, "plan", tmp_path / "r.json", "-n", "4", "-o", tmp_path / "p.json").code == 0
    assert load_plan(tmp_path / "p.json").layers == tuple(tuple(sorted(r[:4])) for r in ranking.layers)
