"""The `search` job: texts in, a ranking file out, resumed layer by layer."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from moe_surgery.checkpoint.fileops import FileOps
from moe_surgery.checkpoint.source import Folder
from moe_surgery.checkpoint.writer import write_file
from moe_surgery.families import FAMILIES, AnyFamily
from moe_surgery.progress import Counter, OnProgress
from moe_surgery.quality.corpus import open_corpus
from moe_surgery.quality.greedy_elimination import LayerOrder, greedy_elimination
from moe_surgery.quality.open_layers import open_layers
from moe_surgery.quality.resume import (
    check_writable,
    default_context,
    identify,
    job_digest,
    partial_path,
)
from moe_surgery.quality.text_files import Texts, as_text_files
from moe_surgery.runtime.text import Text
from moe_surgery.selection.arguments import PathLike
from moe_surgery.selection.ranking import Ranking
from moe_surgery.version import __version__

__all__ = ["METHOD", "search"]

METHOD = "reconstruction"
log = logging.getLogger("moe_surgery")


def search(
    checkpoint: PathLike | Folder,
    texts: Texts,
    output: PathLike,
    *,
    context: int | None = None,
    max_tokens: int | None = None,
    format: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    families: tuple[AnyFamily, ...] = FAMILIES,
    progress: OnProgress | None = None,
) -> Ranking:
    """Rank each layer's experts by how well the first n together reproduce its output on texts; save the ranking.

    All domains count together; `texts`, `format`, `context` and `max_tokens` as for `profile`. All tokens go
    through a layer together (`greedy_elimination` says what that costs). `families` are the model families to
    recognise. `progress` is called with each `Progress`.

    After each layer the orders so far go to `.NAME.partial` next to `output`; the same call resumes there.
    Raises UsageError, InvalidInputError and OutputError.
    """
    out = Path(output)
    partial = partial_path(out)
    check_writable(out, partial)
    spec, source_identity = identify(checkpoint, families)
    model = open_layers(checkpoint, device, dtype, backend=backend, families=families)
    files = as_text_files(texts, format)
    corpus = open_corpus(
        files, Text(checkpoint), context=default_context(spec, context), max_tokens=max_tokens
    )
    settings: dict[str, object] = {
        **model.computation,
        "context": corpus.context,
        "max_tokens": max_tokens,
    }
    job = job_digest(
        [METHOD, source_identity, corpus.texts, [f.format for f in files], settings, __version__]
    )
    passages = list(corpus)
    tokens = sum(len(p.tokens) for p in passages)
    done = _resumed(partial, job)
    log.info("%d tokens through %d layers with experts", tokens, spec.layers)
    searched = Counter(progress, "search", tokens, "tokens", done=tokens * len(done), parts=spec.layers)
    orders = list(done)

    def on_layer(order: LayerOrder) -> None:
        orders.append(order)
        state = {"job": job, "layers": [asdict(o) for o in orders]}
        write_file(partial, json.dumps(state).encode(), FileOps())
        searched.advance(tokens)

    greedy_elimination(model, passages, resumed=done, on_layer=on_layer)
    ranking = Ranking(
        spec.experts,
        tuple(o.experts for o in orders),
        spec.model_type,
        None,
        {
            "method": METHOD,
            "domains": sorted(corpus.domains),
            "tokens": tokens,
            "checkpoint": source_identity,
            "texts": {d: [t for t in ts if t["tokens"]] for d, ts in corpus.texts.items()},
            "settings": settings,
            # By layer: mean relative squared error of the output with the first 1, 2, ... experts, null where
            # the router cannot choose from so few.
            "errors": [[None if e is None else float(f"{e:.6g}") for e in o.errors] for o in orders],
        },
        spec.moe_layers,
    )
    write_file(out, ranking.to_json().encode() + b"\n", FileOps())
    with suppress(OSError):
        partial.unlink()
    return ranking


def _resumed(partial: Path, job: str) -> list[LayerOrder]:
    """Layers finished by an interrupted run of this job."""
    try:
        state = json.loads(partial.read_bytes())
        if state["job"] != job:
            return []
        return [LayerOrder(tuple(o["experts"]), tuple(o["errors"])) for o in state["layers"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
