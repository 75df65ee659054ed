"""Files next to a model that are not part of it: adapters, value heads, backups. transformers ignores them too."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final

from moe_surgery.checkpoint.text import printable

__all__ = ["ADAPTER_CONFIG", "is_addition", "is_weights", "note_of"]

ADAPTER_CONFIG: Final = "adapter_config.json"

_SUFFIX = r"\.(safetensors|bin|gguf|h5|msgpack|onnx|ot|pt|pth)"
_BACKUP = re.compile(
    _SUFFIX
    + r"(\.index\.json)?(\.(bak|backup|old|orig|tmp|part|partial|incomplete|aria2|sha256|md5|[0-9]+)|~)+\Z"
)
_WEIGHTS = re.compile(rf"({_SUFFIX}|\.bin\.index\.json)\Z")
_ADDITIONS = (
    (
        re.compile(r"adapter_(model|config)\b"),
        "a PEFT adapter, which transformers applies if peft is installed; moe-surgery merge adds it to the weights",
    ),
    (re.compile(r"(value_head|v_head)\b"), "a value head of TRL"),
)


def is_addition(name: str) -> bool:
    """Whether a file of this name holds an adapter or a value head rather than the model."""
    return any(pattern.match(name) for pattern, _ in _ADDITIONS)


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights of any format, a backup of some, or their index."""
    return any(pattern.search(name) for pattern in (_WEIGHTS, _BACKUP))


def note_of(names: Iterable[str], unlisted: str) -> str | None:
    """How many of `names` are ignored, with an example and why; None where there is nothing to report.

    `unlisted` is the reason for any other shard that is not read.
    """
    ignored = [(rank, name, why) for name in names for rank, why in _reasons(name, unlisted)]
    if not ignored:
        return None
    _, example, why = min(ignored)
    count = "1 file is" if len(ignored) == 1 else f"{len(ignored)} files are"
    separator = ":" if len(ignored) == 1 else ", such as"
    return f"{count} ignored, as in transformers{separator} {printable(example)} ({why})"


def _reasons(name: str, unlisted: str) -> Iterator[tuple[int, str]]:
    """At most one reason, with its priority."""
    for rank, (pattern, reason) in enumerate(_ADDITIONS):
        if pattern.match(name):
            yield rank, reason
            return
    if name.endswith(".safetensors"):
        yield len(_ADDITIONS), unlisted
    elif _BACKUP.search(name):
        yield len(_ADDITIONS) + 1, "a backup copy"
