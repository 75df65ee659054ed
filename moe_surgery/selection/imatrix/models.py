"""Opens the model that a matrix is of, whichever format it has, and ranks its experts."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.gguf.resolve import is_gguf, open_gguf
from moe_surgery.errors import UsageError
from moe_surgery.families import identify_model
from moe_surgery.families.gguf import identify_gguf
from moe_surgery.families.identity import identity
from moe_surgery.progress import OnProgress
from moe_surgery.selection.arguments import PathLike
from moe_surgery.selection.imatrix.counts import DEFAULT_CHUNK
from moe_surgery.selection.imatrix.cut import cut_imatrix
from moe_surgery.selection.imatrix.statistics import best_metric, matrix_of, statistics_from_imatrix
from moe_surgery.selection.imatrix.weights import CheckpointWeights, GgufWeights, Weights
from moe_surgery.selection.metrics import METRICS, NEEDS
from moe_surgery.selection.plan import Plan
from moe_surgery.selection.rank import rank
from moe_surgery.selection.ranking import Ranking

__all__ = ["cut_for_plan", "open_weights", "rank_imatrix"]

log = logging.getLogger("moe_surgery")


@contextmanager
def open_weights(model: PathLike) -> Iterator[tuple[Weights, str]]:
    """The weights and the identity of `model`, a GGUF file or what `Checkpoint.open` takes. Raises as these."""
    if is_gguf(model):
        with open_gguf(model) as opened:
            spec = identify_gguf(opened)
            yield GgufWeights(spec, opened), identity(opened, spec)
        return
    with Checkpoint.open(model) as checkpoint:
        found = identify_model(checkpoint)
        yield CheckpointWeights(found, checkpoint), identity(checkpoint, found)


def rank_imatrix(
    files: PathLike | Sequence[PathLike],
    model: PathLike,
    metric: str | None = None,
    *,
    chunk_size: int = DEFAULT_CHUNK,
    allow_missing: bool = False,
    progress: OnProgress | None = None,
) -> Ranking:
    """Rank the experts of `model` by the importance matrix of `files`; several are added up.

    `metric`: rms_count, frequency, or energy, which reads the experts' down projections as well; by default rms_count
    where the matrix allows it, else frequency. It is in the ranking's provenance, and logged. Other parameters, and
    errors, as for `statistics_from_imatrix`.
    """
    if metric is not None and metric not in METRICS:
        raise UsageError(f"`metric` {metric}: unknown; known: {', '.join(METRICS)}")
    with open_weights(model) as (weights, name):
        statistics = statistics_from_imatrix(
            files,
            weights,
            identity=name,
            chunk_size=chunk_size,
            energy=metric is not None and NEEDS[metric] == "energy",
            allow_missing=allow_missing,
            progress=progress,
        )
    chosen = metric or best_metric(statistics)
    if metric is None:
        log.warning("experts are ranked by %s", chosen)
    return rank(statistics, chosen)


def cut_for_plan(
    files: PathLike | Sequence[PathLike],
    model: PathLike,
    plan: Plan,
    out: PathLike,
    *,
    chunk_size: int = DEFAULT_CHUNK,
) -> None:
    """Write the importance matrix of `model` pruned by `plan` to `out`, from the matrix of `files`.

    Raises as `statistics_from_imatrix` and `cut_imatrix`.
    """
    paths = [files] if isinstance(files, (str, os.PathLike)) else list(files)
    with open_weights(model) as (weights, _):
        cut_imatrix(matrix_of(paths, weights, chunk_size=chunk_size), plan, weights.spec, Path(out))
