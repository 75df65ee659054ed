"""Router statistics: per-expert sums over texts, from which every metric can be computed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.files import printable_path, read_small_file
from moe_surgery.checkpoint.header import parse_header
from moe_surgery.checkpoint.kinds import STATISTICS, expects
from moe_surgery.checkpoint.strict_json import parse_json
from moe_surgery.checkpoint.text import describe_value, printable
from moe_surgery.checkpoint.writer import write_file
from moe_surgery.errors import InvalidInputError, PlanMismatchError
from moe_surgery.selection.arguments import PathLike, load_if_path
from moe_surgery.selection.fields import layer_numbers, optional_text

__all__ = [
    "COMPUTATION",
    "PROFILED",
    "ExpertStatistics",
    "Statistics",
    "as_statistics",
    "load_statistics",
    "merge",
    "save_statistics",
]

STATISTICS_FORMAT = "moe-surgery.statistics"
VERSION = 2
"""Version 1 has all of `PROFILED`, and nothing else."""
MAX_BYTES = 4 << 30
# Settings that affect the sums, named as the options of `profile`. Files of earlier versions lack the
# first two; unknown matches any value.
COMPUTATION = ("backend", "device", "dtype")

PROFILED = ("count", "gate", "norm", "weighted_norm", "output", "peak_abs", "peak")
"""What `profile` measures."""
_PEAKS = ("peak_abs", "peak")

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
log = logging.getLogger("moe_surgery")


@dataclass(slots=True)
class ExpertStatistics:
    """Sums over the tokens of one domain in one layer, per expert j of E; T_j are the tokens that
    chose j, g their routing weight, f the expert's output (its bias included, before the weight).

    count int64 [E]: |T_j|. gate: sum of g. norm: sum of |f|. weighted_norm: sum of g |f|.
    output [E, hidden]: sum of f. peak_abs, peak: the largest |f_i| and f_i seen in any component
    (0 where no token chose j, and at least 0). down_input: sum of |x|^2, x the input of the down projection.
    energy: the sum over its channels i of (sum of x_i^2) |column i of the down projection|^2, which is the sum of
    |f|^2 if channels are uncorrelated and there is no bias. All but counts are float64.

    All but the counts are None where the source of the statistics does not have them.
    """

    count: Counts
    gate: Floats | None = None
    norm: Floats | None = None
    weighted_norm: Floats | None = None
    output: Floats | None = None
    peak_abs: Floats | None = None
    peak: Floats | None = None
    down_input: Floats | None = None
    energy: Floats | None = None

    @classmethod
    def zeros(cls, experts: int, hidden: int, names: Iterable[str] = PROFILED) -> ExpertStatistics:
        result = cls(np.zeros(experts, np.int64))
        for name in names:
            if name != "count":
                setattr(result, name, np.zeros((experts, hidden) if name == "output" else experts))
        return result

    @property
    def known(self) -> tuple[str, ...]:
        """The names of the statistics that are not None."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is not None)

    def of(self, name: str) -> Floats:
        """The statistic `name`, not a copy. Raises InvalidInputError where it is not known."""
        value: Floats | None = getattr(self, name)
        if value is None:
            raise InvalidInputError(f"these statistics do not have {name}; they have {', '.join(self.known)}")
        return value

    def add(self, other: ExpertStatistics) -> None:
        """Add the statistics of other tokens: sums are added, of peaks the larger is kept.

        What one of the two does not have is None afterwards.
        """
        for name in (f.name for f in fields(self)):
            mine, others = getattr(self, name), getattr(other, name)
            if mine is None or others is None:
                setattr(self, name, None)
            else:
                setattr(self, name, np.maximum(mine, others) if name in _PEAKS else mine + others)


@dataclass(slots=True)
class Statistics:
    """Statistics of a checkpoint over the texts of one or more domains.

    `identity` is the checkpoint's (a digest over its headers), `tokens` counts tokens by domain,
    `texts` lists the texts of each: {"name", "xxh3_128", "tokens"}. `data[domain][layer]`.
    `settings`: backend, device and compute dtype (`COMPUTATION`), context and so on.
    `layer_numbers` are the model's numbers of its MoE layers where they are not 0, 1, ... Of statistics that were
    imported without their model, `model_type` and `identity` are None, and `hidden` is 0 where it is not known.
    """

    model_type: str | None
    identity: str | None
    experts: int
    hidden: int
    top_k: int
    tokens: dict[str, int] = field(default_factory=dict)
    texts: dict[str, list[dict[str, object]]] = field(default_factory=dict)
    data: dict[str, list[ExpertStatistics]] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)
    layer_numbers: tuple[int, ...] = ()

    @property
    def layers(self) -> int:
        return len(next(iter(self.data.values()))) if self.data else 0

    @property
    def known(self) -> tuple[str, ...]:
        """The statistics that all domains and layers have."""
        every = [layer.known for layers in self.data.values() for layer in layers]
        return tuple(name for name in (every[0] if every else ()) if all(name in known for known in every))

    @property
    def domains(self) -> list[str]:
        return sorted(self.data)

    def named(self, domains: Iterable[str] | None = None) -> list[str]:
        """Expand `domains` (default all): each is itself, or its parts ("law" is "law:prompt" and
        "law:answer" where prompts and answers were counted separately).

        Raises InvalidInputError for an unknown one.
        """
        chosen: dict[str, None] = {}
        for domain in self.domains if domains is None else domains:
            parts = [d for d in self.domains if domain in (d, d.rpartition(":")[0] or d)]
            if not parts:
                raise InvalidInputError(
                    f"domain {domain!r} is not in these statistics; there are: {', '.join(self.domains)}"
                )
            chosen.update(dict.fromkeys(parts))
        return list(chosen)

    def over(self, domains: Iterable[str] | None = None) -> list[ExpertStatistics]:
        """Per layer, the sum over `domains` (default all). Raises InvalidInputError for an unknown one."""
        chosen, known = self.named(domains), self.known
        totals = [ExpertStatistics.zeros(self.experts, self.hidden, known) for _ in range(self.layers)]
        for domain in chosen:
            for total, part in zip(totals, self.data[domain], strict=True):
                total.add(part)
        return totals


def merge(parts: Iterable[Statistics | PathLike], names: Sequence[str] | None = None) -> Statistics:
    """The statistics over the texts of all parts; settings are those that all parts have in common.

    A part may be the path of a statistics file. `names` are the parts' names in errors. A part whose
    backend, device or dtype is unknown matches any; it is then unknown in the result. The result has the statistics
    that all parts have; what is left out is logged as a warning (logger "moe_surgery").

    Raises PlanMismatchError unless all are of one checkpoint, computed by one backend on one kind of device
    in one dtype, and no text is in two of them.
    """
    first, *others = (as_statistics(part) for part in parts)
    _check_computation([p.settings for p in (first, *others)], names)
    total = Statistics(first.model_type, first.identity, first.experts, first.hidden, first.top_k)
    total.settings, total.layer_numbers = dict(first.settings), first.layer_numbers
    known = _common([first, *others])
    for part in (first, *others):
        if (part.identity, part.experts, part.layers, part.layer_numbers) != (
            first.identity,
            first.experts,
            first.layers,
            first.layer_numbers,
        ):
            raise PlanMismatchError(
                f"statistics of different checkpoints cannot be merged: {first.identity} and {part.identity}"
            )
        total.settings = {
            key: value
            for key, value in total.settings.items()
            if key in part.settings and part.settings[key] == value
        }
        _check_no_text_twice(total, part)
        for domain in part.domains:
            total.tokens[domain] = total.tokens.get(domain, 0) + part.tokens[domain]
            total.texts.setdefault(domain, []).extend(part.texts[domain])
            layers = total.data.setdefault(
                domain, [ExpertStatistics.zeros(part.experts, part.hidden, known) for _ in part.data[domain]]
            )
            for layer, added in zip(layers, part.data[domain], strict=True):
                layer.add(added)
    return total


def _common(parts: Sequence[Statistics]) -> tuple[str, ...]:
    """The statistics that all parts have."""
    known = tuple(name for name in parts[0].known if all(name in part.known for part in parts))
    lost = sorted({name for part in parts for name in part.known} - set(known))
    if lost:
        log.warning("%s: not in all of the statistics, so left out of their sum", ", ".join(lost))
    return known


def _check_computation(settings: Sequence[Mapping[str, object]], names: Sequence[str] | None) -> None:
    for key in COMPUTATION:
        first: tuple[str, object] | None = None
        for number, part in enumerate(settings):
            if part.get(key) is None:
                continue
            name = names[number] if names else f"part {number + 1}"
            if first is None:
                first = name, part[key]
            elif part[key] != first[1]:
                raise PlanMismatchError(
                    f"statistics computed differently cannot be merged: {key} is {printable(str(first[1]))} in "
                    f"{first[0]} and {printable(str(part[key]))} in {name}; run profile on both with the same `{key}`"
                )


def _check_no_text_twice(total: Statistics, part: Statistics) -> None:
    for domain in sorted(set(total.texts) & set(part.texts)):
        digests = {text.get("xxh3_128") for text in total.texts[domain]}
        for text in part.texts[domain]:
            if text.get("xxh3_128") in digests and text.get("xxh3_128") is not None:
                raise PlanMismatchError(
                    f"domain {domain!r}: the text {text.get('name')} is in two of the files and would count twice"
                )


def save_statistics(statistics: Statistics, path: str | os.PathLike[str]) -> None:
    """Write one safetensors file: tensors `layer.N.<domain>.<statistic>`, the rest as metadata.

    Raises OutputError where it cannot be written; the file appears whole or not at all.
    """
    from safetensors.numpy import save

    tensors: dict[str, npt.NDArray[np.generic]] = {}
    for domain, layers in statistics.data.items():
        for number, layer in enumerate(layers):
            for name in layer.known:
                tensors[f"layer.{number}.{domain}.{name}"] = np.ascontiguousarray(getattr(layer, name))
    metadata = {
        "format": STATISTICS_FORMAT,
        "version": VERSION,
        "model_type": statistics.model_type,
        "identity": statistics.identity,
        "experts": statistics.experts,
        "hidden": statistics.hidden,
        "layers": statistics.layers,
        "top_k": statistics.top_k,
        "tokens": statistics.tokens,
        "texts": statistics.texts,
        "settings": statistics.settings,
        "statistics": statistics.known,
        **({"layer_numbers": statistics.layer_numbers} if statistics.layer_numbers else {}),
    }
    write_file(Path(path), save(tensors, {"moe_surgery": json.dumps(metadata)}), FileOps())


@expects("a statistics file", STATISTICS)
def load_statistics(path: str | os.PathLike[str]) -> Statistics:
    """Read a statistics file.

    Raises InvalidInputError for any other file or a damaged one, OutputError where it cannot be read.
    """
    where = printable_path(path)
    raw = read_small_file(path, limit=MAX_BYTES, what="statistics")
    length = int.from_bytes(raw[:8], "little")
    header = parse_header(raw[: 8 + min(length, len(raw))], len(raw), file=where)
    if "moe_surgery" not in header.metadata:
        raise InvalidInputError(f"{where}: is a safetensors file, but not moe-surgery statistics")
    metadata = parse_json(header.metadata["moe_surgery"].encode(), where=where, allow_floats=True)
    if not isinstance(metadata, dict) or metadata.get("format") != STATISTICS_FORMAT:
        raise InvalidInputError(f"{where}: is not moe-surgery statistics")
    if metadata.get("version") not in (1, VERSION) or isinstance(metadata["version"], bool):
        raise InvalidInputError(f"{where}: statistics version {metadata.get('version')!r} is not supported")
    arrays = {
        name: np.frombuffer(
            raw, _DTYPES[info.dtype], count=info.nbytes // 8, offset=header.data_start + info.begin
        ).reshape(info.shape)
        for name, info in header.tensors.items()
        if info.dtype in _DTYPES
    }
    try:
        return _assembled(metadata, arrays)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(f"{where}: incomplete statistics: {error}") from None


def as_statistics(statistics: Statistics | PathLike) -> Statistics:
    """`statistics`, read by `load_statistics` where it is a path."""
    return load_if_path(statistics, Statistics, load_statistics)


_DTYPES = {"F64": np.float64, "I64": np.int64}


def _assembled(metadata: Mapping[str, object], arrays: Mapping[str, npt.NDArray[np.generic]]) -> Statistics:
    def integer(key: str) -> int:
        value = metadata[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key} is {value!r}")
        return value

    tokens, texts, settings = metadata["tokens"], metadata["texts"], metadata.get("settings", {})
    if not isinstance(tokens, dict) or not isinstance(texts, dict) or tokens.keys() != texts.keys():
        raise ValueError("tokens and texts do not name the same domains")
    if not isinstance(settings, dict):
        raise ValueError("settings is not an object")
    if not tokens or not all(type(n) is int and n > 0 for n in tokens.values()):
        raise ValueError("tokens are not counted for each domain")
    if not all(isinstance(t, list) and all(isinstance(x, dict) for x in t) for t in texts.values()):
        raise ValueError("texts are not listed for each domain")
    old = metadata["version"] == 1
    names = list(PROFILED) if old else metadata["statistics"]
    known = [f.name for f in fields(ExpertStatistics)]
    if not isinstance(names, list) or "count" not in names or any(name not in known for name in names):
        raise ValueError(f"statistics are {describe_value(names)}")
    experts = integer("experts")
    hidden = 0 if metadata["hidden"] == 0 and "output" not in names else integer("hidden")
    shapes = {name: (experts, hidden) if name == "output" else (experts,) for name in names}
    data: dict[str, list[ExpertStatistics]] = {}
    for domain in tokens:
        data[domain] = []
        for layer in range(integer("layers")):
            values = {name: arrays[f"layer.{layer}.{domain}.{name}"] for name in shapes}
            if wrong := [n for n in shapes if values[n].shape != shapes[n]]:
                raise ValueError(f"layer.{layer}.{domain}.{wrong[0]} has shape {values[wrong[0]].shape}")
            if values["count"].dtype != np.int64 or not all(np.isfinite(a).all() for a in values.values()):
                raise ValueError(f"layer.{layer}.{domain} holds values that are not counts or finite sums")
            data[domain].append(ExpertStatistics(**values))  # type: ignore[arg-type]
    return Statistics(
        str(metadata["model_type"]) if old else optional_text(metadata["model_type"], "model_type"),
        str(metadata["identity"]) if old else optional_text(metadata["identity"], "identity"),
        experts,
        hidden,
        integer("top_k"),
        tokens,
        texts,
        data,
        settings,
        layer_numbers(metadata.get("layer_numbers"), integer("layers"), "layer_numbers"),
    )
