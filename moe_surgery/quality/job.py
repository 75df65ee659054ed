"""The `profile` job: texts in, a statistics file out, resumed where it stopped."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moe_surgery.checkpoint.source import Folder
from moe_surgery.errors import InvalidInputError, UsageError
from moe_surgery.families import FAMILIES, AnyFamily
from moe_surgery.progress import Counter, OnProgress
from moe_surgery.quality.answers import generate_answers
from moe_surgery.quality.corpus import Passage, batches, open_corpus
from moe_surgery.quality.open_layers import open_layers
from moe_surgery.quality.parts import ModelArguments, Parked, ProfilePart, in_order, one_by_one
from moe_surgery.quality.profile import count_tokens, profile_passages
from moe_surgery.quality.resume import (
    check_writable,
    default_context,
    identify,
    job_digest,
    partial_path,
)
from moe_surgery.quality.text_files import Texts, as_text_files
from moe_surgery.runtime.load import load_model
from moe_surgery.runtime.text import Text
from moe_surgery.selection.arguments import PathLike
from moe_surgery.selection.plan import Plan, as_plan
from moe_surgery.selection.statistics import (
    ExpertStatistics,
    Statistics,
    load_statistics,
    merge,
    save_statistics,
)
from moe_surgery.surgery.routing import check_view
from moe_surgery.version import __version__
from moe_surgery.workers import Workers, everywhere

__all__ = ["BATCH_TOKENS", "ProfileResult", "profile"]

BATCH_TOKENS = 8192
log = logging.getLogger("moe_surgery")


@dataclass(frozen=True, slots=True)
class ProfileResult:
    """The statistics, their file, and the tokens that an interrupted run had already finished."""

    statistics: Statistics
    output: Path
    resumed_tokens: int


def profile(
    checkpoint: PathLike | Folder,
    texts: Texts,
    output: PathLike,
    *,
    context: int | None = None,
    max_tokens: int | None = None,
    format: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
    generate: int | None = None,
    sequential: Plan | PathLike | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    families: tuple[AnyFamily, ...] = FAMILIES,
    workers: Workers | None = None,
    progress: OnProgress | None = None,
) -> ProfileResult:
    """Run texts through a checkpoint one layer at a time and save what its experts did.

    `texts`: paths, or the paths of each domain by its name (see `Texts`); `format`: "text", "jsonl" or
    "chat", guessed by default. `context`: longest passage in tokens (default: 4096 or the model's);
    longer texts are split. `max_tokens` bounds each domain. All passages of a batch of `batch_tokens`
    go through a layer before the next is loaded: memory holds one layer and the batch's hidden states.
    `generate`: the model first answers each conversation, in at most that many tokens. `sequential` (a
    plan or its path): layers get the output of earlier layers pruned by this plan. `device`, `dtype` and
    `backend` as for `load_model`. `families` are the model families to recognise. `workers` do several batches at
    a time; the sums are added in the order of the batches, so the file is the same. `progress` is called
    with each `Progress`; texts that are split or skipped are reported as warnings on the logger
    "moe_surgery".

    After each batch the sums so far go to `.NAME.partial` next to `output`; the same call resumes
    there. Raises UsageError, InvalidInputError (a file without text, not UTF-8, malformed),
    PlanMismatchError, OutputError.
    """
    out = Path(output)
    spec, source_identity = identify(checkpoint, families)
    if sequential is not None:
        sequential = as_plan(sequential)
        check_view(spec, sequential, str(checkpoint))
    if generate is not None:
        spec.require_description()
    if batch_tokens < 1:
        raise UsageError(f"`batch_tokens` {batch_tokens}: must be at least 1")
    partial = partial_path(out)
    check_writable(out, partial)
    model = open_layers(checkpoint, device, dtype, backend=backend, families=families)
    text = Text(checkpoint)
    files = as_text_files(texts, format)
    corpus = open_corpus(files, text, context=default_context(spec, context), max_tokens=max_tokens)
    settings: dict[str, object] = {
        **model.computation,
        "context": corpus.context,
        "max_tokens": max_tokens,
        "generate": generate,
        "sequential": None if sequential is None else sequential.as_dict(),
    }
    job = job_digest(
        [source_identity, corpus.texts, [f.format for f in corpus.files], settings, batch_tokens, __version__]
    )
    passages: Iterable[Passage] = corpus
    if generate is not None:
        full_model = load_model(checkpoint, device, dtype, backend=backend, families=families)
        answered = Counter(progress, "answer", sum(1 for _ in corpus.prompts()), "prompts")
        file = out.with_name(f"{out.name}.answers.jsonl")
        stops = text.stop_tokens or None
        passages, skipped = generate_answers(
            full_model, corpus, generate, file, job=job, stop_tokens=stops, progress=answered.advance
        )
        del full_model
        if skipped:
            log.warning("%d prompts leave no space for an answer in the context and were skipped", skipped)
    total = sum(len(p.tokens) for p in passages)  # reads all texts once, before the long work
    if corpus.split:
        log.warning("%d texts are longer than %d tokens and were split", corpus.split, corpus.context)
    statistics, batches_done = _resumed(partial, job)
    resumed = sum(statistics.tokens.values()) if statistics else 0
    layers = model.depth
    profiled = Counter(progress, "profile", total, "tokens", done=resumed * layers, parts=layers)

    def finished(batch: Sequence[Passage], data: Mapping[str, list[ExpertStatistics]]) -> Statistics:
        _check_finite(data, str(checkpoint))
        return Statistics(
            spec.model_type,
            source_identity,
            spec.experts,
            model.hidden_size,
            spec.top_k,
            count_tokens(batch),
            {d: [] for d in data},
            dict(data),
            {},
            spec.moe_layers,
        )

    def measured(batch: Sequence[Passage]) -> Statistics:
        return finished(
            batch, profile_passages(model, batch, sequential=sequential, progress=profiled.advance)
        )

    def advance(tokens: int) -> None:
        profiled.advance(tokens * layers)

    numbered = ((n, b) for n, b in enumerate(batches(passages, batch_tokens)) if n >= batches_done)
    parked = Parked(partial, job)
    if workers is None:
        parts = one_by_one(numbered, parked, measured, advance)
    else:
        computation = tuple(sorted(model.computation.items()))
        loaded = ModelArguments(
            everywhere(str(checkpoint)), device, dtype, backend, source_identity, computation
        )
        todo = ((n, ProfilePart(loaded, batch, sequential)) for n, batch in numbered)
        parts = in_order(workers, todo, batches_done, parked, finished, advance)
    for number, part in parts:
        statistics = part if statistics is None else merge([statistics, part])
        statistics.settings = {"job": job, "batches": number + 1}
        save_statistics(statistics, partial)
    assert statistics is not None
    if generate is not None:  # files have only the prompts; tokens are counted per domain
        for listed in corpus.texts.values():
            for text_ in listed:
                text_.pop("tokens")
    for domain in statistics.domains:
        listed = corpus.texts.get(domain) or corpus.texts[domain.rpartition(":")[0]]
        statistics.texts[domain] = [
            text for text in listed if text.get("tokens") != 0
        ]  # not reached before max_tokens
    statistics.settings = settings
    save_statistics(statistics, out)
    with suppress(OSError):
        partial.unlink()
    return ProfileResult(statistics, out, resumed)


def _resumed(partial: Path, job: str) -> tuple[Statistics | None, int]:
    """Statistics of an interrupted run of this job, and the number of its batches."""
    if not partial.exists():
        return None, 0
    try:
        statistics = load_statistics(partial)
    except InvalidInputError:
        return None, 0
    batches_done = statistics.settings.get("batches")
    if statistics.settings.get("job") != job or not isinstance(batches_done, int):
        return None, 0
    return statistics, batches_done


def _check_finite(data: Mapping[str, Sequence[ExpertStatistics]], checkpoint: str) -> None:
    for layers in data.values():
        for number, layer in enumerate(layers):
            if not all(np.isfinite(layer.of(name).sum()) for name in ("gate", "norm", "weighted_norm")):
                raise InvalidInputError(
                    f"{checkpoint}: layer {number} gives numbers that are not finite; try a larger `dtype`"
                )
