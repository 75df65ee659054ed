"""Where a checkpoint comes from: its name, and the published model that it is or descends from."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.files import read_small_file
from moe_surgery.errors import UsageError
from moe_surgery.families.identity import identity
from moe_surgery.families.model import Model
from moe_surgery.report.card_front import MAX_README_BYTES, SourceCard, read_source_card
from moe_surgery.report.card_text import is_hub_id

__all__ = ["checked_base_model", "origin_of", "read_readme"]

_CACHE_PREFIX = "models--"


def origin_of(
    checkpoint: Checkpoint, model: Model, readme: SourceCard, base_model: str | None
) -> dict[str, object]:
    """What the manifest records of the source beside its files; no path of this machine in it.

    `name` and `identity` of the checkpoint, its `expert_storage` and `top_k`; where known
    `base_model`, an id on the hub, `base_model_from` ("option", "cache", "config" or "card") and, for
    a snapshot in the hub's cache, `revision`.
    """
    origin: dict[str, object] = {
        "name": _name(checkpoint, model),
        "identity": identity(checkpoint, model),
        "expert_storage": model.expert_format.name,
        "top_k": model.top_k,
    }
    cached, revision = _cached(checkpoint.path)
    named = checkpoint.config.get("_name_or_path")
    if cached:
        origin["name"] = cached.rpartition("/")[2]
    if base_model is not None:
        origin |= {"base_model": checked_base_model(base_model), "base_model_from": "option"}
    elif cached:
        origin |= {"base_model": cached, "base_model_from": "cache", "revision": revision}
    elif isinstance(named, str) and "/" in named and is_hub_id(named):
        origin |= {"base_model": named, "base_model_from": "config"}
    elif readme.base_model:
        origin |= {"base_model": readme.base_model, "base_model_from": "card"}
    return origin


def checked_base_model(text: str) -> str:
    """`text` if it has the form of an id on the hub; raises UsageError."""
    if not is_hub_id(text):
        raise UsageError(f"--base-model {text}: is no model id of the hub; write OWNER/NAME")
    return text


def read_readme(path: str | os.PathLike[str] | None) -> SourceCard:
    """The card in the file `path`; an empty one without a file, or for one too large to be a card.

    Raises OutputError where the file cannot be read.
    """
    if path is None:
        return SourceCard()
    with suppress(OSError):  # which reading will tell better
        if os.stat(path).st_size > MAX_README_BYTES:
            return SourceCard()
    return read_source_card(read_small_file(path, limit=MAX_README_BYTES, what="a model card"))


def _name(checkpoint: Checkpoint, model: Model) -> str:
    """The folder's name; that of its parent for OpenAI's layout in `original/`."""
    folder = Path(os.path.abspath(checkpoint.path))
    if model.layout.hub_config is not None and folder.name == "original" and folder.parent.name:
        folder = folder.parent
    # A name of this system may be no Unicode, which JSON has to be.
    return os.fsencode(folder.name).decode("utf-8", "replace") or "source"


def _cached(folder: Path) -> tuple[str | None, str]:
    """The hub id and revision of a snapshot in the hub's cache (or a folder inside one)."""
    for path in (Path(os.path.abspath(folder)), folder.resolve()):
        parts = path.parts
        for place, part in enumerate(parts[:-2]):
            hub_id = part.removeprefix(_CACHE_PREFIX).replace("--", "/", 1)
            if part.startswith(_CACHE_PREFIX) and parts[place + 1] == "snapshots" and is_hub_id(hub_id):
                return hub_id, parts[place + 2]
    return None, ""
