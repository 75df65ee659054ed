"""Importance matrices as `Statistics`: counts, inputs of the down projections, and energies."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import numpy as np

from moe_surgery.errors import InvalidInputError, UsageError
from moe_surgery.progress import Counter, OnProgress
from moe_surgery.selection.arguments import PathLike
from moe_surgery.selection.imatrix.checks import check_belongs, check_shapes
from moe_surgery.selection.imatrix.counts import DEFAULT_CHUNK, Routed, solve_counts
from moe_surgery.selection.imatrix.matrix import Block, Imatrix, add
from moe_surgery.selection.imatrix.reader import load_imatrix
from moe_surgery.selection.imatrix.weights import Weights
from moe_surgery.selection.statistics import ExpertStatistics, Statistics

__all__ = ["best_metric", "matrix_of", "statistics_from_imatrix"]

log = logging.getLogger("moe_surgery")


def best_metric(statistics: Statistics) -> str:
    """The metric to rank statistics of an importance matrix by: rms_count where they allow it, else frequency.

    Energy, which reads the weights as well, was further from the full model where it was measured (docs/imatrix.md).
    """
    return "rms_count" if "down_input" in statistics.known else "frequency"


def statistics_from_imatrix(
    files: PathLike | Sequence[PathLike],
    weights: Weights | None = None,
    *,
    identity: str | None = None,
    domain: str | None = None,
    chunk_size: int = DEFAULT_CHUNK,
    energy: bool | None = None,
    allow_missing: bool = False,
    progress: OnProgress | None = None,
) -> Statistics:
    """The statistics in the importance matrix of `files`; several are added up.

    `weights` are those of the model that it is checked to belong to; `identity` is that model's. Without them, layers,
    experts and experts per token are taken from the matrix, which must then be of GGUF's form. `domain` names
    its texts, by default after the (first) file. `chunk_size`: tokens in a chunk, for legacy files, which do not say.
    `energy`: read the down projections as well, which may fetch them (True), not (False), or where they are on this
    machine (None). Layers without data are refused, or have
    counts of zero with `allow_missing`. `progress` is called with each `Progress`, in experts read.

    What is left out or assumed is logged as warnings (logger "moe_surgery"). Raises InvalidInputError,
    OutputError as `load_imatrix`, PlanMismatchError for a matrix of another model, UsageError.
    """
    paths = [files] if isinstance(files, (str, os.PathLike)) else list(files)
    matrix = matrix_of(paths, weights, chunk_size=chunk_size)
    blocks = {block.number: block for block in matrix.blocks() if _has_data(block)}
    numbers = tuple(blocks) if weights is None else weights.spec.layer_numbers
    missing = [number for number in numbers if number not in blocks]
    if not blocks or (missing and not allow_missing):
        raise InvalidInputError(
            f"{matrix.where}: has no data for the experts of layer "
            f"{', '.join(map(str, missing[:6]))}{', ...' if len(missing) > 6 else ''}; add a matrix that has (several "
            "are added up), or pass `allow_missing=True`, and experts of these layers are kept by number"
            if blocks
            else f"{matrix.where}: has no experts; it is of a dense model, or was made with an old llama.cpp"
        )
    if missing:
        log.warning(
            "no data for layer %s: the first experts of these layers are kept", ", ".join(map(str, missing))
        )
    for note in matrix.notes:
        log.warning("%s", note)
    any_block = next(iter(blocks.values()))
    experts = _experts(any_block) if weights is None else weights.spec.experts
    top_k = _top_k(matrix, blocks) if weights is None else weights.spec.top_k
    inputs = any_block.expert_input
    with_down = all(block.down is not None for block in blocks.values())
    if not with_down:
        log.warning("%s: lacks inputs of down projections, so only counts can be used", matrix.where)
    layers = [_layer(blocks.get(number), experts, with_down) for number in numbers]
    if energy is not False and with_down:
        _add_energy(layers, [blocks.get(n) for n in numbers], numbers, weights, energy is True, progress)
    tokens = max(int(layer.count.sum()) for layer in layers) // top_k
    name = domain or os.path.basename(os.fspath(paths[0])).partition(".")[0] or "imatrix"
    return Statistics(
        None if weights is None else weights.spec.model_type,
        identity,
        experts,
        0 if inputs is None else inputs.sums.shape[1],
        top_k,
        {name: max(tokens, 1)},
        {name: _texts(matrix, paths)},
        {name: layers},
        _settings(matrix, paths),
        () if numbers == tuple(range(len(numbers))) else numbers,
    )


def matrix_of(
    paths: Sequence[PathLike], weights: Weights | None, *, chunk_size: int = DEFAULT_CHUNK
) -> Imatrix:
    """The files' matrices with counts, checked to belong to the model of `weights`, and added up.

    Raises as `statistics_from_imatrix`.
    """
    if not paths:
        raise UsageError("`imatrix`: name at least one file")
    if chunk_size < 1:
        raise UsageError(f"`chunk_size` {chunk_size}: must be at least 1")
    matrices = []
    for path in paths:
        matrix = load_imatrix(path)
        if weights is not None:
            check_shapes(matrix, weights)
        if matrix.legacy:
            matrix = _solved(matrix, weights, chunk_size)
        if weights is not None:
            check_belongs(matrix, weights)
        matrices.append(matrix)
    return add(matrices)


def _solved(matrix: Imatrix, weights: Weights | None, chunk_size: int) -> Imatrix:
    if weights is None:
        raise UsageError(
            f"{matrix.where}: is in the legacy form, which has no counts; they can be solved for where the model is "
            "known: pass `model`"
        )
    if not weights.same_inputs:
        raise InvalidInputError(
            f"{matrix.where}: is in the legacy form, which has no counts, and they cannot be solved for in this "
            "architecture, whose experts read something else than the router; make a matrix in the form of GGUF with "
            "llama-imatrix, which stores counts"
        )
    solved = solve_counts(matrix, Routed(weights.spec.experts, weights.spec.top_k, weights.norm), chunk_size)
    if solved.residuals:
        worst = max(solved.residuals.values())
        log.warning(
            "%s: is in the legacy form: counts were solved for (relative residual at most %.1e), with %d tokens in a "
            "chunk",
            matrix.where,
            worst,
            chunk_size,
        )
    return solved


def _has_data(block: Block) -> bool:
    entry = block.expert_input or block.down
    return entry is not None and entry.counts is not None and bool(entry.counts.sum())


def _experts(block: Block) -> int:
    entry = block.expert_input or block.down
    assert entry is not None
    return entry.experts


def _layer(block: Block | None, experts: int, with_down: bool) -> ExpertStatistics:
    layer = ExpertStatistics.zeros(experts, 0, ("down_input",) if with_down else ())
    if block is None:
        return layer
    entry = block.expert_input or block.down
    assert entry is not None
    assert entry.counts is not None
    if entry.experts != experts:
        raise InvalidInputError(f"block {block.number} has {entry.experts} experts, others have {experts}")
    layer.count = entry.counts.copy()
    if block.down is not None and with_down:
        layer.down_input = block.down.sums.sum(axis=1, dtype=np.float64)
    return layer


def _add_energy(
    layers: Sequence[ExpertStatistics],
    blocks: Sequence[Block | None],
    numbers: Sequence[int],
    weights: Weights | None,
    fetch: bool,
    progress: OnProgress | None,
) -> None:
    """Add sum over i of (sum of x_i^2) |column i of the down projection|^2 to every layer, where it can be read."""
    if weights is None:
        return
    why = weights.why_no_energy()
    if why is None and weights.remote and not fetch:
        why = (
            "the weights of experts are on the hub; they are fetched for the metric energy if you ask for it"
        )
    if why is not None:
        log.warning("no energies: %s", why)
        return
    read = Counter(progress, "energy", len(layers) * weights.spec.experts, "experts")
    for layer, block, number in zip(layers, blocks, numbers, strict=True):
        energies = np.zeros(weights.spec.experts)
        if block is not None and block.down is not None:
            for expert, norms in enumerate(weights.down_norms(number)):
                energies[expert] = block.down.sums[expert].astype(np.float64) @ norms
                read.advance(1)
        layer.energy = energies


def _top_k(matrix: Imatrix, blocks: dict[int, Block]) -> int:
    """Experts a token, from counts over experts and those of the router."""
    for block in blocks.values():
        dense, entry = block.entries.get("ffn_gate_inp.weight"), block.expert_input or block.down
        if dense is None or dense.counts is None or entry is None or entry.counts is None:
            continue
        total, tokens = int(entry.counts.sum()), int(dense.counts[0])
        if not tokens or total % tokens:
            raise InvalidInputError(
                f"{matrix.where}: block {block.number}: {total:,} tokens in all experts are not a multiple of the "
                f"router's {tokens:,}; the matrix is damaged"
            )
        return total // tokens
    raise UsageError(f"{matrix.where}: does not say how many experts a token chooses; pass `model`")


def _texts(matrix: Imatrix, paths: Sequence[PathLike]) -> list[dict[str, object]]:
    """An entry for each file, named after it, or after the texts of the only one."""
    names = [os.path.basename(os.fspath(path)) for path in paths]
    if len(names) == 1 and matrix.datasets:
        names = [", ".join(matrix.datasets)]
    return [{"name": name, "xxh3_128": digest} for name, digest in zip(names, matrix.digests, strict=True)]


def _settings(matrix: Imatrix, paths: Sequence[PathLike]) -> dict[str, object]:
    return {
        "source": "imatrix",
        "files": [os.path.basename(os.fspath(path)) for path in paths],
        "datasets": list(matrix.datasets),
        "chunks": matrix.chunks,
        **({"residual": max(matrix.residuals.values())} if matrix.residuals else {}),
    }
