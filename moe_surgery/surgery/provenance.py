"""Provenance of a checkpoint: its name, and the published model that it is or derives from."""

from __future__ import annotations

import os
from pathlib import Path

from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.hub import is_hub_id
from moe_surgery.errors import UsageError
from moe_surgery.families.identity import identity
from moe_surgery.families.model_spec import ModelSpec

__all__ = ["checked_base_model", "origin_of"]


def origin_of(
    checkpoint: Checkpoint,
    model: ModelSpec,
    *,
    base_model: str | None = None,
    card_base_model: str | None = None,
) -> dict[str, object]:
    """The manifest's entry on the source, apart from its files; without local paths.

    `name` and `identity` of the checkpoint, its `expert_storage` and `top_k`; where known
    `base_model`, an id on the hub, `base_model_from` ("option", "cache", "config" or "card") and, for a model
    read from the hub's cache or from the hub itself ("cache" for both), its commit as `revision`. `base_model` is
    the user's choice, `card_base_model` that of the source's model card. Raises UsageError for a `base_model` that
    is not an id.
    """
    origin: dict[str, object] = {
        "name": _name(checkpoint, model),
        "identity": identity(checkpoint, model),
        "expert_storage": model.expert_format.name,
        "top_k": model.top_k,
    }
    hub_id, revision = checkpoint.files.hub_model or (None, "")
    named = checkpoint.config.get("_name_or_path")
    if hub_id:
        origin["name"] = hub_id.rpartition("/")[2]
    if base_model is not None:
        origin |= {"base_model": checked_base_model(base_model), "base_model_from": "option"}
    elif hub_id:
        origin |= {"base_model": hub_id, "base_model_from": "cache", "revision": revision}
    elif isinstance(named, str) and "/" in named and is_hub_id(named):
        origin |= {"base_model": named, "base_model_from": "config"}
    elif card_base_model:
        origin |= {"base_model": card_base_model, "base_model_from": "card"}
    return origin


def checked_base_model(text: str) -> str:
    """`text` if it has the form of an id on the hub; raises UsageError."""
    if not is_hub_id(text):
        raise UsageError(f"`base_model` {text}: is not a model id of the hub; expected OWNER/NAME")
    return text


def _name(checkpoint: Checkpoint, model: ModelSpec) -> str:
    """The folder's name; that of its parent for OpenAI's layout in `original/`."""
    folder = Path(os.path.abspath(checkpoint.path))
    if model.layout.hub_config is not None and folder.name == "original" and folder.parent.name:
        folder = folder.parent
    # File names need not be valid Unicode, but JSON must be.
    return os.fsencode(folder.name).decode("utf-8", "replace") or "source"
