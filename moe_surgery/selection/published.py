"""The published statistics tree, `<dataset>/<category>/<outcome>.json`, and the rankings made from it.

Each file holds, for the phases think and answer, how often each expert was chosen in each layer
(`count_frequency`), as a mean over `sample_count` samples. Per layer, experts are ranked by the sum
over files and phases of sample_count * count_frequency, descending, ties in order of first
appearance. A topic's published ranking interleaves the order over the topic's folders with that over
all files, position by position.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from moe_surgery.checkpoint.files import printable_path, read_small_file
from moe_surgery.checkpoint.kinds import PUBLISHED_STATISTICS, expects
from moe_surgery.checkpoint.strict_json import parse_json
from moe_surgery.errors import InvalidInputError, OutputError, PlanMismatchError, UsageError
from moe_surgery.selection.arguments import PathLike
from moe_surgery.selection.ranking import Ranking, as_ranking
from moe_surgery.selection.shipped import RANKINGS, topic_folders

__all__ = [
    "TREE_FILES",
    "PublishedDomain",
    "interleave",
    "load_published",
    "rank_published",
    "rank_topic",
    "statistics_files",
]

PHASES = ("think_expert_analytics", "answer_expert_analytics")
TOKENS = dict(zip(PHASES, ("num_think_tokens", "num_answer_tokens"), strict=True))
OUTCOMES = ("False_False", "True_False", "False_True", "True_True")
TREE_FILES = 703
"""Number of files in the whole published tree."""

MAX_BYTES = 100_000_000
MAX_EXPERTS = 1024
_LAYER = re.compile(r"layer_(0|[1-9][0-9]{0,4})", re.ASCII)


def statistics_files(folder: str | os.PathLike[str]) -> list[Path]:
    """All .json files below `folder` (or that one file), in path order.

    Raises OutputError if there are none.
    """
    root = Path(folder)
    if root.is_file():
        return [root]
    files = sorted(p for p in root.rglob("*.json") if p.is_file())
    if not files:
        raise OutputError(f"{printable_path(root)}: contains no statistics (.json files)")
    return files


def rank_published(files: Iterable[Path], num_experts: int | None = None) -> Ranking:
    """The published ranking over `files`, in the order given.

    `num_experts` is the model's number; without it, the largest one named. Experts that no file names
    come last, by number. Raises InvalidInputError naming a file that cannot be read as statistics.
    """
    totals: dict[int, dict[int, float]] = {}
    names = []
    for file in files:
        names.append("/".join(file.parts[-3:]))
        for layer, expert, amount in _amounts(file):
            row = totals.setdefault(layer, {})
            row[expert] = row.get(expert, 0.0) + amount
    if not any(totals.values()):
        raise InvalidInputError(f"{', '.join(names[:3])}: the statistics name no expert")
    layers = len(totals)
    if sorted(totals) != list(range(layers)):
        raise InvalidInputError(f"the statistics name layers {sorted(totals)}, not 0 to {layers - 1}")
    named = max(max(row, default=0) for row in totals.values()) + 1
    count = named if num_experts is None else num_experts
    if not 1 <= count <= MAX_EXPERTS:
        raise UsageError(f"`num_experts` {count}: choose 1 to {MAX_EXPERTS}")
    if named > count:
        raise PlanMismatchError(f"the statistics name expert {named - 1}, but the model has {count}")
    return Ranking(
        count,
        tuple(_ordered(totals[layer], count) for layer in range(layers)),
        scores=tuple(tuple(totals[layer].get(e, 0.0) for e in range(count)) for layer in range(layers)),
        provenance={"method": "frequency", "statistics": names},
    )


@dataclass(slots=True)
class PublishedDomain:
    """The published statistics of one folder `<dataset>/<category>`.

    `frequency[layer][expert]` and `weight[layer][expert]` are sums over files and phases of sample_count times
    `count_frequency` and `prob_density`. `tokens` is None where a file does not say how many.
    """

    files: list[str] = field(default_factory=list)
    samples: int = 0
    tokens: float | None = 0.0
    frequency: dict[int, dict[int, float]] = field(default_factory=dict)
    weight: dict[int, dict[int, float]] = field(default_factory=dict)


def load_published(files: Iterable[Path]) -> dict[str, PublishedDomain]:
    """The published statistics in `files`, by folder `<dataset>/<category>`, in the order given.

    Raises InvalidInputError naming a file that cannot be read as statistics.
    """
    domains: dict[str, PublishedDomain] = {}
    for file in files:
        where = printable_path(file)
        domain = domains.setdefault("/".join(file.absolute().parts[-3:-1]), PublishedDomain())
        root = _root(file)
        samples = _number(root["sample_count"], f"{where}: sample_count")
        domain.files.append(file.name)
        domain.samples += round(samples)
        for phase, key in TOKENS.items():
            if phase in root and domain.tokens is not None:
                count = None if root.get(key) is None else _number(root[key], f"{where}: {key}")
                domain.tokens = None if count is None else domain.tokens + samples * count
        for totals, name in ((domain.frequency, "count_frequency"), (domain.weight, "prob_density")):
            for layer, expert, amount in _amounts_in(root, where, name):
                row = totals.setdefault(layer, {})
                row[expert] = row.get(expert, 0.0) + amount
    return domains


def rank_topic(tree: str | os.PathLike[str], topic: str, num_experts: int | None = None) -> Ranking:
    """The ranking of `topic` as published, from the whole statistics tree below the folder `tree`.

    "all" ranks over every file; "unsafety" reverses "safety"; the others interleave the order over the
    topic's folders with that of "all". `num_experts` as in `rank_published`. Raises UsageError for an unknown
    topic, OutputError where one of its folders is missing, and as `rank_published`.
    """
    if topic not in RANKINGS:
        raise UsageError(f"unknown topic {topic!r}; known: {', '.join(RANKINGS)}")
    counted = "safety" if topic == "unsafety" else topic
    files = [] if topic == "all" else _topic_files(Path(tree), counted)
    statistics = statistics_files(tree)
    everything = rank_published(statistics, num_experts)
    if topic == "all":
        return replace(everything, provenance={**everything.provenance, "topic": topic})
    own = rank_published(files, everything.num_experts)
    named = {"ranking": "all", "method": "frequency", "files": len(statistics)}
    ranking = interleave(
        replace(own, provenance={**own.provenance, "topic": topic}), replace(everything, provenance=named)
    )
    if topic != "unsafety":
        return ranking
    return replace(
        ranking,
        layers=tuple(row[::-1] for row in ranking.layers),
        provenance={**ranking.provenance, "method": "frequency, reversed"},
    )


def interleave(own: Ranking | PathLike, other: Ranking | PathLike) -> Ranking:
    """Interleave two rankings: position by position, first the expert of `own`, then that of `other`, each once.

    Either may be a path that `load_ranking` takes. Raises PlanMismatchError where their shapes differ.
    """
    own, other = as_ranking(own), as_ranking(other)
    if (own.num_experts, len(own.layers)) != (other.num_experts, len(other.layers)):
        raise PlanMismatchError(
            f"cannot interleave rankings of {len(own.layers)} x {own.num_experts} and "
            f"{len(other.layers)} x {other.num_experts} experts"
        )
    layers = tuple(
        tuple(dict.fromkeys(chain.from_iterable(zip(a, b, strict=True))))
        for a, b in zip(own.layers, other.layers, strict=True)
    )
    provenance = {**own.provenance, "interleaved_with": dict(other.provenance)}
    return Ranking(own.num_experts, layers, own.model_type or other.model_type, None, provenance)


def _topic_files(tree: Path, topic: str) -> list[Path]:
    """The topic's files: its folders in order, each one's files by outcome."""
    files: list[Path] = []
    missing = []
    folders = topic_folders(topic)
    for folder in folders:
        outcomes = [f for name in OUTCOMES if (f := tree / folder / f"{name}.json").is_file()]
        files += outcomes
        if not outcomes:
            missing.append(folder)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise OutputError(
            f"{printable_path(tree)}: {len(missing)} of the {len(folders)} folders of topic {topic} are missing: "
            f"{', '.join(missing[:3])}{more}; pass the root of the whole published tree"
        )
    return files


def _ordered(row: Mapping[int, float], experts: int) -> tuple[int, ...]:
    """By total, descending; Python's sort keeps first appearance among equals."""
    named = sorted(row, key=lambda e: -row[e])
    return (*named, *(e for e in range(experts) if e not in row))


def _amounts(file: Path) -> Iterable[tuple[int, int, float]]:
    """(layer, expert, sample_count * count_frequency) of one file, in the file's order."""
    return _amounts_in(_root(file), printable_path(file), "count_frequency")


def _amounts_in(root: Mapping[str, object], where: str, name: str) -> Iterable[tuple[int, int, float]]:
    """(layer, expert, sample_count * entry `name`) of one file, in the file's order."""
    samples = _number(root["sample_count"], f"{where}: sample_count")
    for phase in PHASES:
        for key, experts in _object(root.get(phase) or {}, f"{where}: {phase}").items():
            match = _LAYER.fullmatch(key)
            if not match:
                raise InvalidInputError(f"{where}: {phase}: key {key[:40]!r} is not layer_N")
            for expert, entry in _object(experts, f"{where}: {phase}: {key}").items():
                inside = f"{where}: {phase}: {key}: expert {expert[:20]!r}"
                if not expert.isascii() or not expert.isdigit() or len(expert) > 5:
                    raise InvalidInputError(f"{inside} is not an expert number")
                amount = samples * _number(_object(entry, inside).get(name, 0.0), inside)
                if not math.isfinite(amount):
                    raise InvalidInputError(f"{inside}: sample_count times {name} is not a finite number")
                yield int(match[1]), int(expert), amount


@expects("statistics", PUBLISHED_STATISTICS)
def _root(path: Path) -> dict[str, object]:
    where = printable_path(path)
    raw = read_small_file(path, limit=MAX_BYTES, what="statistics")
    root = parse_json(raw, where=where, allow_floats=True)
    if not isinstance(root, dict):
        raise InvalidInputError(f"{where}: not expert statistics: expected a JSON object")
    _number(root.get("sample_count"), f"{where}: sample_count")
    if not any(phase in root for phase in PHASES):
        raise InvalidInputError(f"{where}: not expert statistics: has none of {', '.join(PHASES)}")
    return root


def _object(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise InvalidInputError(f"{where}: expected a JSON object")
    return value


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise InvalidInputError(f"{where}: expected a number of at least 0")
    return float(value)
