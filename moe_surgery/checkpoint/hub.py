"""Names of models on the hub, and snapshots in its local cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["cache_name", "is_hub_id", "snapshot_of"]

_HUB_ID = re.compile(r"(?:\w[\w.-]{0,94}/)?\w[\w.-]{0,94}", re.ASCII)
_CACHE_PREFIX = "models--"


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form of a model id on the hub: OWNER/NAME, or the old NAME."""
    return (
        _HUB_ID.fullmatch(text) is not None
        and len(text) <= 96
        and not any(bad in text for bad in ("--", ".."))
        and not any(part[-1] in "-." for part in text.split("/"))
        and not text.endswith(".git")
    )


def cache_name(repository: str) -> str:
    """The name of the folder of a model in the hub's cache, whether or not it is there."""
    return _CACHE_PREFIX + repository.replace("/", "--")


def snapshot_of(folder: Path) -> tuple[str | None, str]:
    """The hub id and revision if `folder` is a snapshot in the hub's cache, or inside one; else (None, "")."""
    for path in (Path(os.path.abspath(folder)), folder.resolve()):
        parts = path.parts
        for i, part in enumerate(parts[:-2]):
            hub_id = part.removeprefix(_CACHE_PREFIX).replace("--", "/", 1)
            if part.startswith(_CACHE_PREFIX) and parts[i + 1] == "snapshots" and is_hub_id(hub_id):
                return hub_id, parts[i + 2]
    return None, ""
