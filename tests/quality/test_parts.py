"""Parts of profile and evaluate, finished in any order, give the file that one process gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from moe_surgery import evaluate, inspect, plan_random, profile, prune
from moe_surgery.errors import UsageError
from moe_surgery.progress import Progress
from moe_surgery.quality.parts import model_of
from tests.support.shuffled_workers import ShuffledWorkers

TINY = "example:tiny"
LIMITS: dict[str, Any] = {"context": 48, "batch_tokens": 48, "max_tokens": 200}
Texts = dict[str, list[Path]]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    folder = tmp_path_factory.mktemp("texts")
    for name, words in (("law", "The tenant shall pay the rent. "), ("code", "def f(x): return x + 1\n")):
        (folder / name).write_text("".join(f"{n}. {words}" for n in range(20)))
    return {name: [folder / name] for name in ("law", "code")}


@pytest.fixture(scope="module")
def alone(texts: Texts) -> bytes:
    out = texts["law"][0].parent / "alone.stats"
    profile(TINY, texts, out, **LIMITS)
    return out.read_bytes()


@pytest.fixture(scope="module")
def parts(texts: Texts) -> int:
    """How many there are of that job."""
    whole = ShuffledWorkers()
    profile(TINY, texts, texts["law"][0].parent / "whole.stats", **LIMITS, workers=whole)
    return whole.done


@pytest.mark.parametrize("seed", range(2))
def test_statistics_do_not_depend_on_the_order_in_which_parts_finish(
    texts: Texts, alone: bytes, tmp_path: Path, seed: int
) -> None:
    seen: list[Progress] = []
    out = tmp_path / "parts.stats"
    profile(TINY, texts, out, **LIMITS, workers=ShuffledWorkers(seed), progress=seen.append)
    assert out.read_bytes() == alone
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert (seen[0].done, seen[-1].done) == (0, seen[-1].total)
    assert [f.name for f in tmp_path.iterdir()] == ["parts.stats"]


@pytest.mark.parametrize("stopped_after", [1, 4])
def test_finished_parts_are_not_done_again(
    texts: Texts, alone: bytes, parts: int, tmp_path: Path, stopped_after: int
) -> None:
    class Stop(Exception):
        pass

    reports: list[int] = []

    def stop(progress: Progress) -> None:
        reports.append(progress.done)
        if len(reported_parts := reports[1:]) == stopped_after:
            assert reported_parts
            raise Stop

    out = tmp_path / "parts.stats"
    first, second = ShuffledWorkers(7), ShuffledWorkers(8)
    with pytest.raises(Stop):
        profile(TINY, texts, out, **LIMITS, workers=first, progress=stop)
    profile(TINY, texts, out, **LIMITS, workers=second)
    assert out.read_bytes() == alone
    assert second.done == parts - stopped_after
    assert not [f.name for f in tmp_path.iterdir() if "partial" in f.name]


def test_one_process_finishes_what_several_began(texts: Texts, alone: bytes, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.done > progress.total / 2:
            raise KeyboardInterrupt

    out = tmp_path / "parts.stats"
    with pytest.raises(KeyboardInterrupt):
        profile(TINY, texts, out, **LIMITS, workers=ShuffledWorkers(), progress=stop)
    profile(TINY, texts, out, **LIMITS)
    assert out.read_bytes() == alone
    assert [f.name for f in tmp_path.iterdir()] == ["parts.stats"]


@pytest.mark.parametrize("batch_tokens", [100, 100_000], ids=["passages", "plans"])
def test_evaluations_do_not_depend_on_how_they_are_divided(
    texts: Texts, tmp_path: Path, batch_tokens: int
) -> None:
    model = inspect(TINY)
    prune(TINY, tmp_path / "pruned", plan_random(12, 9, model))
    arguments: dict[str, Any] = {
        "plans": [(f"random-{n}", plan_random(8, n, model)) for n in range(3)],
        "pruned": [tmp_path / "pruned"],
        "top_k": 3,
        **LIMITS,
        "batch_tokens": batch_tokens,
    }
    workers = ShuffledWorkers()
    found = evaluate(TINY, texts, **arguments, workers=workers)
    assert found.to_json() == evaluate(TINY, texts, **arguments).to_json()
    assert workers.done > 3


def test_a_worker_with_another_checkpoint_or_backend_is_refused(texts: Texts, tmp_path: Path) -> None:
    import torch

    class Other(ShuffledWorkers):
        def run(self, work: Any, parts: Any) -> Any:
            from dataclasses import replace

            changed = (replace(p, model=replace(p.model, **self.change)) for p in parts)
            return super().run(work, changed)

    for change, message in (
        ({"identity": "0" * 32}, "is another checkpoint on a worker's machine"),
        ({"backend": "reference", "dtype": torch.float16}, "a worker computes with"),
    ):
        model_of.cache_clear()
        workers = Other()
        workers.change = change
        with pytest.raises(UsageError, match=message):
            profile(TINY, texts, tmp_path / "x.stats", **LIMITS, workers=workers)
