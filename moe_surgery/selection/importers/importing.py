"""Files of other programs -> `Statistics`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import xxhash

from moe_surgery.checkpoint.files import printable_path, read_small_file
from moe_surgery.checkpoint.kinds import GGUF, IMATRIX, MAPPING, PICKLE, RANKING, kind_of, wrong_kind
from moe_surgery.errors import InvalidInputError, UsageError
from moe_surgery.progress import OnProgress
from moe_surgery.selection.arguments import PathLike
from moe_surgery.selection.imatrix.counts import DEFAULT_CHUNK
from moe_surgery.selection.imatrix.models import open_weights
from moe_surgery.selection.imatrix.statistics import statistics_from_imatrix
from moe_surgery.selection.imatrix.weights import Weights
from moe_surgery.selection.importers.arrays import counts_from_npy
from moe_surgery.selection.importers.formats import FORMATS
from moe_surgery.selection.importers.sglang import counts_from_sglang
from moe_surgery.selection.importers.table import CountTable, for_layers
from moe_surgery.selection.importers.text import COUNTS, counts_from_csv, counts_from_json, counts_from_jsonl
from moe_surgery.selection.statistics import ExpertStatistics, Statistics, merge

__all__ = ["import_statistics"]

log = logging.getLogger("moe_surgery")
MAX_BYTES = 4 << 30

Read = Callable[[bytes, str], CountTable]
_COUNTS: Mapping[str, Read] = MappingProxyType(
    {
        "json": counts_from_json,
        "jsonl": counts_from_jsonl,
        "csv": counts_from_csv,
        "npy": counts_from_npy,
        "sglang": counts_from_sglang,
    }
)
_SUFFIXES = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".npy": "npy",
    ".pt": "sglang",
    ".dat": "imatrix",
    ".imatrix": "imatrix",
    ".gguf": "imatrix",
    ".gguf_file": "imatrix",
}


def import_statistics(
    files: PathLike | Sequence[PathLike],
    *,
    model: PathLike | None = None,
    file_format: str | None = None,
    domains: Sequence[str] = (),
    model_top_k: int | None = None,
    chunk_size: int = DEFAULT_CHUNK,
    energy: bool | None = None,
    allow_missing: bool = False,
    progress: OnProgress | None = None,
) -> Statistics:
    """The statistics that `files` of one format support.

    `file_format` is one of `FORMATS`, by default known by content or name. `domains`: one name for all files, which are
    then added up, or one for each; by default a file's name is its domain. `model`, a checkpoint or a GGUF file, is
    what they are checked against and made for; without it they are for any model with such layers, counts alone need
    `model_top_k`, the experts a token chooses, and legacy importance matrices cannot be read. `chunk_size`,
    `energy`, `allow_missing` and `progress` as for `statistics_from_imatrix`.

    Raises InvalidInputError, PlanMismatchError, OutputError and UsageError.
    """
    paths = [files] if isinstance(files, (str, os.PathLike)) else list(files)
    if not paths:
        raise UsageError("`files`: name at least one file")
    if file_format is not None and file_format not in FORMATS:
        raise UsageError(f"`file_format` {file_format}: choose one of {', '.join(FORMATS)}")
    formats = [file_format or _format_of(path) for path in paths]
    if len(set(formats)) > 1:
        raise UsageError(
            f"{printable_path(paths[0])} is {formats[0]}, another file {next(f for f in formats if f != formats[0])}: "
            "import them separately and add them up with stats merge"
        )
    if formats[0] == "imatrix" and model_top_k is not None:
        raise UsageError("`model_top_k` is for counts alone; importance matrices have it")
    groups = _by_domain(paths, domains)

    def read(weights: Weights | None, identity: str | None) -> Statistics:
        parts = []
        for domain, group in groups.items():
            if formats[0] == "imatrix":
                part = statistics_from_imatrix(
                    group,
                    weights,
                    identity=identity,
                    domain=domain,
                    chunk_size=chunk_size,
                    energy=energy,
                    allow_missing=allow_missing,
                    progress=progress,
                )
            else:
                tables = [_read(path, formats[0]) for path in group]
                part = _from_counts(tables, group, weights, identity, domain, model_top_k, allow_missing)
            parts.append(part)
        merged = merge(parts)
        merged.settings = {**merged.settings, "files": [os.path.basename(os.fspath(path)) for path in paths]}
        return merged

    if model is None:
        return read(None, None)
    with open_weights(model) as (weights, identity):
        return read(weights, identity)


def _by_domain(paths: Sequence[PathLike], domains: Sequence[str]) -> dict[str, list[PathLike]]:
    """The files of each domain."""
    if len(domains) not in (0, 1, len(paths)):
        raise UsageError(
            f"`domains`: {len(domains)} names for {len(paths)} files; give one for all files, or one for each"
        )
    groups: dict[str, list[PathLike]] = {}
    for number, path in enumerate(paths):
        own = os.path.basename(os.fspath(path)).partition(".")[0] or "imported"
        name = own if not domains else domains[number if len(domains) > 1 else 0]
        groups.setdefault(name, []).append(path)
    return groups


def _format_of(path: PathLike) -> str:
    kind = kind_of(path)
    if kind in (IMATRIX, GGUF):  # the reader says what else a GGUF file is
        return "imatrix"
    suffix = Path(path).suffix.lower()
    if kind is not None and kind is not PICKLE and suffix not in (".json", ".jsonl"):
        raise InvalidInputError(wrong_kind(path, COUNTS, kind))
    if suffix not in _SUFFIXES:
        raise UsageError(
            f"{printable_path(path)}: the name does not say what it is; pass `file_format`: {', '.join(FORMATS)}"
        )
    return _SUFFIXES[suffix]


def _read(path: PathLike, file_format: str) -> CountTable:
    where = printable_path(path)
    raw = read_small_file(path, limit=MAX_BYTES, what="counts")
    try:
        table = _COUNTS[file_format](raw, where)
    except InvalidInputError as error:
        kind = kind_of(path)
        ours = b'"moe-surgery.' in raw[:4096]
        if kind in (None, PICKLE) or (kind in (RANKING, MAPPING) and not ours):  # which look like counts
            raise
        assert kind is not None
        raise InvalidInputError(wrong_kind(path, COUNTS, kind)) from error
    return CountTable(table.where, table.counts, table.numbers, xxhash.xxh3_128_hexdigest(raw))


def _from_counts(
    tables: Sequence[CountTable],
    paths: Sequence[PathLike],
    weights: Weights | None,
    identity: str | None,
    domain: str,
    top_k: int | None,
    allow_missing: bool,
) -> Statistics:
    digests = [table.digest for table in tables]
    if len(set(digests)) < len(digests):
        raise InvalidInputError(f"{tables[0].where}: is given twice, and would count twice")
    if weights is None:
        if top_k is None:
            raise UsageError(
                f"{tables[0].where}: counts do not say how many experts a token chooses; pass `model` or `model_top_k`"
            )
        if top_k < 1:
            raise UsageError(f"`model_top_k` {top_k}: must be at least 1")
        experts = max(table.counts.shape[1] for table in tables)
        numbers = _with_tokens(tables)
        model = "the other file"
    else:
        if top_k not in (None, weights.spec.top_k):
            raise UsageError(f"`model_top_k` {top_k}: the model chooses {weights.spec.top_k} experts a token")
        top_k, experts = weights.spec.top_k, weights.spec.experts
        numbers, model = weights.spec.layer_numbers, weights.where
    counts = np.zeros((len(numbers), experts), np.int64)
    for table in tables:
        counts += for_layers(table, numbers, experts, model)
    missing = [number for number, row in zip(numbers, counts, strict=True) if not row.any()]
    if len(missing) == len(numbers) or (missing and not allow_missing):
        raise InvalidInputError(
            f"{tables[0].where}: has no tokens in layer {', '.join(map(str, missing[:6]))}"
            f"{', ...' if len(missing) > 6 else ''}; pass `allow_missing=True` to keep the first experts there"
        )
    if missing:
        log.warning(
            "no data for layer %s: the first experts of these layers are kept", ", ".join(map(str, missing))
        )
    return Statistics(
        None if weights is None else weights.spec.model_type,
        identity,
        experts,
        0,
        top_k,
        {domain: max(int(counts.sum(axis=1).max()) // top_k, 1)},
        {domain: [{"name": os.path.basename(table.where), "xxh3_128": table.digest} for table in tables]},
        {domain: [ExpertStatistics(row) for row in counts]},
        {"source": "counts", "files": [os.path.basename(os.fspath(path)) for path in paths]},
        () if numbers == tuple(range(len(numbers))) else numbers,
    )


def _with_tokens(tables: Sequence[CountTable]) -> tuple[int, ...]:
    """The numbers of the layers with experts of an unknown model: those named, or rows that are not all zero."""
    found: set[int] = set()
    for table in tables:
        if table.numbers is not None:
            found |= {n for n, row in zip(table.numbers, table.counts, strict=True) if row.any()}
        else:
            found |= {int(n) for n in np.flatnonzero(table.counts.any(axis=1))}
    if not found:
        raise InvalidInputError(f"{tables[0].where}: counts no token")
    return tuple(sorted(found))
