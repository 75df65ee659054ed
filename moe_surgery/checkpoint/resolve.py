"""Resolves the name of a checkpoint to its folder or file."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.hub import cache_name, is_hub_id
from moe_surgery.checkpoint.kinds import STATISTICS, WEIGHTS, kind_of, wrong_kind
from moe_surgery.errors import OutputError, UsageError

__all__ = ["EXAMPLES", "check_is_path", "download_command", "model_to_fetch", "resolve", "snapshot"]

EXAMPLES = {"tiny": "tiny-gpt-oss"}
_EXAMPLES_FOLDER = Path(__file__).parent.parent / "examples"
_SOURCE = re.compile(r"(example|published):|[a-z][a-z0-9+.-]*://", re.ASCII)
_NOT_READ = ("original/*", "metal/*")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)


def resolve(name: str | os.PathLike[str]) -> Path:
    """The folder or .safetensors file that `name` means.

    `name` is a path, `example:tiny` (the embedded checkpoint), or a hub id `owner/model[@revision]`
    whose snapshot is in the local hub cache; nothing is fetched. A path that exists wins.

    Raises UsageError for an unknown example or an empty name, OutputError where nothing is found.
    """
    text = os.fspath(name)
    if text.startswith("example:"):
        return _example(text.removeprefix("example:"))
    if not text:  # an unset shell variable, perhaps; it must not mean the current folder
        raise UsageError("the name of the checkpoint is empty")
    path = Path(text)
    if path.is_dir():
        return path
    if path.exists():
        kind = kind_of(path)
        if kind == STATISTICS or (kind not in (None, WEIGHTS) and path.suffix != ".safetensors"):
            assert kind is not None
            raise UsageError(wrong_kind(path, "a checkpoint", kind))
        if path.suffix != ".safetensors":
            raise UsageError(
                f"{printable_path(path)}: is neither a folder nor a .safetensors file; "
                "pass the checkpoint's folder"
            )
        return path
    if _is_hub_name(text):
        return _from_hub_cache(text)
    raise OutputError(f"{printable_path(path)}: no such checkpoint folder or file")


def model_to_fetch(name: str | os.PathLike[str]) -> tuple[str, str | None] | None:
    """Repository and revision if `name` is a hub id to be read from the hub; None where `resolve` decides.

    That is so for a path that exists, a model that is complete in the cache, and offline (HF_HUB_OFFLINE).
    """
    text = os.fspath(name)
    if not _is_hub_name(text) or Path(text).exists():
        return None
    repository, _, revision = text.partition("@")
    if not is_hub_id(repository):
        return None
    folder = snapshot(repository, revision)
    if folder is not None and _is_complete(folder):
        return None
    from huggingface_hub import constants

    return None if constants.HF_HUB_OFFLINE else (repository, revision or None)


def _is_hub_name(text: str) -> bool:
    return _HUB_ID.fullmatch(text) is not None and not text.startswith(".")


def check_is_path(out: str | os.PathLike[str]) -> None:
    """Raise UsageError where the output `out` looks like a source.

    Sources are `example:...`, `published:...`, `scheme://...`, and `owner/model@revision` unless there is a
    folder `owner`. A `Path`, and a string that begins with "./" or "/", is always a path.
    """
    if not isinstance(out, str):
        return
    hub = _HUB_ID.fullmatch(out)
    revision = hub is not None and hub[1] and not out.startswith(".") and not Path(out).parent.is_dir()
    if _SOURCE.match(out) or revision:
        path_text = printable_path(out)
        raise UsageError(f"{path_text}: is a source, not an output path; for a path, write ./{path_text}")


def _example(name: str) -> Path:
    if name not in EXAMPLES:
        raise UsageError(f"example:{name}: unknown example; known: {', '.join(EXAMPLES)}")
    return _EXAMPLES_FOLDER / EXAMPLES[name]


def download_command(repository: str, revision: str) -> str:
    """The command that fetches what is read here: not the copies of the same weights in other formats."""
    at = f" --revision {revision}" if revision else ""
    return f"hf download {repository}{at}" + "".join(f' --exclude "{pattern}"' for pattern in _NOT_READ)


def _from_hub_cache(hub_id: str) -> Path:
    repository, _, revision = hub_id.partition("@")
    if (folder := snapshot(repository, revision)) is not None:
        return folder
    raise OutputError(
        f"{hub_id}: no such folder, and not in the local hub cache; "
        f"download it first: {download_command(repository, revision)}"
    )


def snapshot(repository: str, revision: str) -> Path | None:
    """The folder of a model in the local hub cache, which need not be complete; None where it is not there."""
    try:
        from huggingface_hub import constants
    except ImportError:
        at = f"@{revision}" if revision else ""
        raise OutputError(
            f"{repository}{at}: no such folder; to look in the hub cache install huggingface_hub "
            "(pip install 'moe-surgery[hub]')"
        ) from None
    if not (Path(constants.HF_HUB_CACHE) / cache_name(repository)).is_dir():
        return None  # without importing what follows, which takes longer than the first requests
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    # Any pattern: without one, a snapshot that lacks only files that are not read here would be refused.
    try:
        folder = snapshot_download(
            repository, revision=revision or None, allow_patterns=["config.json"], local_files_only=True
        )
        return Path(folder)
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _is_complete(snapshot: Path) -> bool:
    """Whether config.json and all weights are in the folder `snapshot`, as far as the files in it say."""
    index = snapshot / "model.safetensors.index.json"
    if not (snapshot / "config.json").is_file():
        return False
    if not index.is_file():
        return (snapshot / "model.safetensors").is_file()
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
        return all((snapshot / shard).is_file() for shard in shards)
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return True  # malformed: opening it says so
