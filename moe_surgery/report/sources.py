"""What a page can be made from: statistics of `profile`, the published statistics, or rankings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.kinds import PUBLISHED_STATISTICS, RANKING, STATISTICS, kind_of, wrong_kind
from moe_surgery.errors import InvalidInputError, PlanMismatchError, UsageError
from moe_surgery.report.figures import Subject, View, check_number_of_domains, in_order, share_of, subject_of
from moe_surgery.selection.arguments import PathLike
from moe_surgery.selection.published import MAX_EXPERTS, PublishedDomain, load_published, statistics_files
from moe_surgery.selection.ranking import Ranking, load_ranking
from moe_surgery.selection.shipped import PREFIX, is_shipped
from moe_surgery.selection.statistics import Statistics, load_statistics

__all__ = ["Sources", "published_subject", "ranking_subject", "read_subject", "source_files"]

Sources = Statistics | Subject | PathLike | Sequence[PathLike]

MAX_LAYERS = 1024
T = TypeVar("T")
WANTED = "a statistics file or a ranking"
PUBLISHED_ABOUT = {
    "frequency": "the share of a sample's tokens that chose the expert, summed over samples",
    "gate": "its mean routing weight in a sample, summed over samples",
}
RANKING_ABOUT = {"ranking": "the expert's place in its layer"}


def read_subject(sources: Sources, domains: Sequence[str] | None = None) -> Subject:
    """The subject of a page.

    `sources` is a statistics object, a file of `profile`, or one or more of: folders and files of the published
    statistics (a domain is a folder); ranking files and `published:NAME`. `domains` selects some of them.
    Raises UsageError for a mixture or an unknown domain, and as the readers.
    """
    if isinstance(sources, Subject):
        return sources
    if isinstance(sources, Statistics):
        return subject_of(sources, domains)
    if isinstance(sources, (str, os.PathLike)):
        sources = [sources]
    if not isinstance(sources, Sequence) or not sources:
        raise TypeError(f"expected statistics or the paths of files, not {type(sources).__name__}")
    kinds = {_kind(source) for source in sources}
    if len(kinds) > 1:
        raise UsageError(
            f"{', '.join(printable_path(s) for s in sources[:3])}: a report shows files of one kind: a statistics "
            "file, published statistics, or rankings"
        )
    [kind] = kinds
    if kind is PUBLISHED_STATISTICS:
        return published_subject(load_published(source_files(sources)), domains)
    if kind is RANKING:
        return ranking_subject([(_ranking_name(s), load_ranking(s)) for s in sources], domains)
    if len(sources) > 1:
        raise UsageError(
            f"{printable_path(sources[1])}: a report shows one statistics file; merge them with `stats merge`"
        )
    return subject_of(load_statistics(sources[0]), domains)


def source_files(sources: Sequence[PathLike]) -> list[Path]:
    """The files that `sources` are read from."""
    files: list[Path] = []
    for source in sources:
        if not is_shipped(source):
            files += statistics_files(source) if Path(source).is_dir() else [Path(source)]
    return files


def published_subject(found: Mapping[str, PublishedDomain], domains: Sequence[str] | None = None) -> Subject:
    """The published statistics by domain: how often experts were chosen and, if every domain has them, their
    routing weights. Layers and experts are those named. Raises InvalidInputError, UsageError."""
    chosen = _chosen(found, domains)
    layers = 1 + max((layer for d in chosen.values() for layer in d.frequency), default=-1)
    experts = 1 + max((e for d in chosen.values() for row in d.frequency.values() for e in row), default=-1)
    if not layers or not experts:
        raise InvalidInputError(f"{', '.join(list(chosen)[:3])}: the statistics name no expert")
    if layers > MAX_LAYERS or experts > MAX_EXPERTS:
        raise InvalidInputError(
            f"the statistics name layer {layers - 1} and expert {experts - 1}; expected at most {MAX_LAYERS} layers "
            f"of {MAX_EXPERTS} experts"
        )
    tables = {"frequency": {name: _table(d.frequency, layers, experts) for name, d in chosen.items()}}
    weights = {name: _table(d.weight, layers, experts) for name, d in chosen.items()}
    if all(table.any() for table in weights.values()):
        tables["gate"] = weights
    tokens = {name: None if d.tokens is None else round(d.tokens) for name, d in chosen.items()}
    known = [n for n in tokens.values() if n is not None]
    names: list[str | None] = [None, *chosen] if len(chosen) > 1 else [*chosen]

    def view(name: str | None) -> View:
        scores = {
            m: table[name] if name else np.sum([*table.values()], axis=0) for m, table in tables.items()
        }
        orders = {m: in_order(rows) for m, rows in scores.items()}
        parts = {kind: scores[m] for kind, m in (("weight", "gate"), ("routes", "frequency")) if m in scores}
        total = sum(known) if len(known) == len(tokens) else None
        return View(
            name,
            tokens[name] if name else total,
            scores,
            orders,
            {kind: share_of(part, part.sum(axis=1, keepdims=True)) for kind, part in parts.items()},
        )

    return Subject(
        None,
        None,
        layers,
        experts,
        None,
        [view(name) for name in names],
        tuple(tables),
        texts={name: [{"name": f"{file}"} for file in d.files] for name, d in chosen.items()},
        about=PUBLISHED_ABOUT,
        source="published statistics",
    )


def ranking_subject(rankings: Sequence[tuple[str, Ranking]], domains: Sequence[str] | None = None) -> Subject:
    """Rankings of one model, each as a domain. Raises PlanMismatchError where they are of different models."""
    if len({name for name, _ in rankings}) < len(rankings):
        raise UsageError("two rankings have the same name; rename one of the files")
    chosen = _chosen(dict(rankings), domains)
    first_name, first = next(iter(chosen.items()))
    expected = (first.num_experts, len(first.layers))
    model_type = next((r.model_type for r in chosen.values() if r.model_type is not None), None)
    for name, ranking in chosen.items():
        if (ranking.num_experts, len(ranking.layers)) != expected or ranking.model_type not in (
            None,
            model_type,
        ):
            raise PlanMismatchError(
                f"{name}: ranks {len(ranking.layers)} layers of {ranking.num_experts} experts of "
                f"{ranking.model_type or 'an unknown model'}, but {first_name} {expected[1]} layers of "
                f"{expected[0]} of {model_type or 'an unknown model'}; compare rankings of one model"
            )
    views = []
    for name, ranking in chosen.items():
        orders = np.array(ranking.layers)
        places = (ranking.num_experts - np.argsort(orders, axis=1)).astype(np.float64)
        views.append(View(name, None, {"ranking": places}, {"ranking": orders}))
    return Subject(
        model_type,
        None,
        expected[1],
        expected[0],
        None,
        views,
        ("ranking",),
        measured=False,
        about=RANKING_ABOUT,
        source=f"{len(chosen)} rankings" if len(chosen) > 1 else "a ranking",
    )


def _kind(source: PathLike) -> object:
    """STATISTICS, PUBLISHED_STATISTICS or RANKING; also STATISTICS for what its reader will explain."""
    if is_shipped(source):
        return RANKING
    kind = kind_of(source)
    if kind is None:
        return PUBLISHED_STATISTICS if Path(source).is_dir() else STATISTICS
    if kind not in (STATISTICS, PUBLISHED_STATISTICS, RANKING):
        raise InvalidInputError(wrong_kind(source, WANTED, kind))
    return kind


def _ranking_name(source: PathLike) -> str:
    return os.fspath(source).removeprefix(PREFIX) if is_shipped(source) else Path(source).stem


def _chosen(found: Mapping[str, T], domains: Sequence[str] | None) -> dict[str, T]:
    if domains and (unknown := [d for d in domains if d not in found]):
        raise UsageError(f"domain {unknown[0]!r} is not among {', '.join(list(found)[:20])}")
    chosen = {name: found[name] for name in (domains or found)}
    check_number_of_domains(len(chosen), "choose with `domains`")
    return chosen


def _table(rows: Mapping[int, Mapping[int, float]], layers: int, experts: int) -> np.ndarray:
    table = np.zeros((layers, experts))
    for layer, row in rows.items():
        for expert, amount in row.items():
            table[layer, expert] = amount
    return table
