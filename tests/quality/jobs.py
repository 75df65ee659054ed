"""Running profile jobs and comparing their statistics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from moe_surgery.progress import Progress  # noqa: E402
from moe_surgery.quality.corpus import open_corpus, text_files  # noqa: E402
from moe_surgery.quality.job import ProfileResult, profile  # noqa: E402
from moe_surgery.runtime.text import Text  # noqa: E402
from moe_surgery.selection.statistics import Statistics  # noqa: E402
from tests.support.routed import assert_same  # noqa: E402

TINY = "example:tiny"
F32 = torch.float32


def run(out: Path, *paths: Path, dtype: torch.dtype = F32, **options: object) -> ProfileResult:
    return profile(TINY, text_files(paths), out, dtype=dtype, **options)  # type: ignore[arg-type]


def sequences(text: Text, *paths: Path, context: int = 4096) -> dict[str, list[tuple[int, ...]]]:
    result: dict[str, list[tuple[int, ...]]] = {}
    for passage in open_corpus(text_files(paths), text, context=context):
        result.setdefault(passage.domain, []).append(passage.tokens)
    return result


def check(actual: Statistics, expected: Statistics, rtol: float = 1e-5) -> None:
    assert (actual.tokens, actual.texts, actual.identity) == (
        expected.tokens,
        expected.texts,
        expected.identity,
    )
    assert actual.domains == expected.domains
    for domain in actual.domains:
        assert_same(actual.data[domain], expected.data[domain], rtol)


class Recorder:
    """Writes down the amounts by which each stage advances; raises KeyboardInterrupt at call `stop_at` of one."""

    def __init__(self, stop_in: str = "", stop_at: int = 0) -> None:
        self.stages: list[tuple[str, int, list[int]]] = []
        self._stop = stop_in, stop_at

    def __call__(self, progress: Progress) -> None:
        if not self.stages or self.stages[-1][0] != progress.stage:
            self.stages.append((progress.stage, progress.total, []))
        _, total, amounts = self.stages[-1]
        assert progress.total == total
        amounts.append(progress.done - sum(amounts))
        if (progress.stage, len(amounts)) == self._stop:
            raise KeyboardInterrupt


def interrupted(out: Path, paths: Sequence[Path], calls: int, **options: object) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(out, *paths, progress=Recorder("profile", calls), **options)
    assert not out.exists()
