"""The eight published rankings of gpt-oss-20b and the topics behind them; data/README.md names their source."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

from moe_surgery.checkpoint.text import printable
from moe_surgery.errors import UsageError

__all__ = ["PREFIX", "RANKINGS", "is_shipped", "shipped_ranking", "topic_folders"]

PREFIX = "published:"
RANKINGS = (
    "all",
    "health_or_medicine",
    "instruction_following",
    "law",
    "math",
    "safety",
    "science",
    "unsafety",
)
_FOLDER = Path(__file__).parent / "data"


def is_shipped(path: str | os.PathLike[str]) -> bool:
    """Whether `path` names a shipped ranking, `published:NAME`, known or not."""
    return os.fspath(path).startswith(PREFIX)


def shipped_ranking(path: str | os.PathLike[str]) -> tuple[tuple[int, ...], ...]:
    """The 24 layers of `published:NAME`, each an order of experts 0..31, best first.

    Raises UsageError, listing the eight names, for an unknown one.
    """
    name = os.fspath(path).removeprefix(PREFIX)
    if name not in RANKINGS:
        raise UsageError(
            f"{PREFIX}{printable(name, limit=60)}: unknown published ranking; known: {', '.join(RANKINGS)}"
        )
    return tuple(tuple(row) for row in _read("rankings.json")[name])


def topic_folders(topic: str) -> list[str]:
    """The folders `<dataset>/<category>` of the published tree that `topic` counts over, in their order."""
    return list(_read("topics.json")[topic])


@cache
def _read(name: str) -> dict[str, list]:  # type: ignore[type-arg]
    content: dict[str, list] = json.loads((_FOLDER / name).read_text(encoding="utf-8"))  # type: ignore[type-arg]
    return content
