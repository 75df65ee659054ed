"""Recognises a file by its content, so that an error can say what was passed by mistake."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar, cast

from moe_surgery.checkpoint.additions import ADAPTER_CONFIG
from moe_surgery.checkpoint.files import open_regular, printable_path
from moe_surgery.checkpoint.strict_json import parse_json
from moe_surgery.errors import InvalidInputError, MoeSurgeryError

__all__ = [
    "EVALUATION",
    "IMATRIX",
    "MANIFEST",
    "MAPPING",
    "NOT_TEXTS",
    "PLAN",
    "PUBLISHED_STATISTICS",
    "RANKING",
    "STATISTICS",
    "WEIGHTS",
    "Kind",
    "check_kind",
    "expecting",
    "expects",
    "kind_of",
    "wrong_kind",
]

PathLike = str | os.PathLike[str]
Read = TypeVar("Read", bound=Callable[..., Any])

MAX_BYTES = 100_000_000
HEAD_BYTES = 1 << 16
MAX_HEADER_BYTES = 100_000_000


class Kind(NamedTuple):
    """`title` follows "is" in a message, `use` says which command takes such a file."""

    title: str
    use: str


PLAN: Final = Kind("a plan", "pass it to --plan of prune, export, evaluate, generate, trace or report")
RANKING: Final = Kind("a ranking", "make a plan of it with moe-surgery plan RANKING --experts N")
STATISTICS: Final = Kind("a statistics file", "use it with moe-surgery rank, plan, report or stats")
PUBLISHED_STATISTICS: Final = Kind(
    "published statistics of experts", "use them with moe-surgery rank or report"
)
EVALUATION: Final = Kind("an evaluation", "pass it to --evaluation of moe-surgery report or card")
SWEEP: Final = Kind("the index of a sweep", "run sweep with its folder again to make what is missing")
TRACE: Final = Kind("a trace", "no command reads it; moe-surgery trace writes its page with -o")
MANIFEST: Final = Kind("the manifest of a pruned checkpoint", "pass its folder to verify or card")
MAPPING: Final = Kind("the expert mapping of a pruned checkpoint", "pass its folder")
BENCH: Final = Kind("the result of a benchmark", "no command reads it")
INSPECTION: Final = Kind("the result of inspect", "no command reads it; pass the checkpoint")
PARTIAL: Final = Kind("an unfinished search", "run the same moe-surgery search command to finish it")
REMARK: Final = Kind("what rank or search printed with --json", "the ranking is the file written with -o")
CONFIG: Final = Kind("the config.json of a model", "pass its folder")
INDEX: Final = Kind("the shard index of a checkpoint", "pass its folder")
ADAPTER: Final = Kind("a PEFT adapter", "merge it into its model with moe-surgery merge ADAPTER CKPT OUT")
CHECKPOINT: Final = Kind("a checkpoint folder", "pass it where help says CKPT")
WEIGHTS: Final = Kind("a safetensors file of weights", "pass it where help says CKPT")
IMATRIX: Final = Kind(
    "an importance matrix", "pass it to --imatrix of plan or prune, or to moe-surgery stats import"
)
GGUF: Final = Kind(
    "a GGUF file", "inspect, plan, prune and verify take it; elsewhere pass the checkpoint it was made from"
)
PAGE: Final = Kind("an HTML page", "open it in a browser")
PICKLE: Final = Kind("a PyTorch file (pickle)", "convert the checkpoint to safetensors")

NOT_TEXTS: Final = frozenset(
    {PLAN, RANKING, STATISTICS, PUBLISHED_STATISTICS, EVALUATION, SWEEP, TRACE, MANIFEST, MAPPING, BENCH}
    | {INSPECTION, REMARK, PARTIAL, INDEX, CHECKPOINT, WEIGHTS, GGUF, IMATRIX, PICKLE, ADAPTER}
)
"""Kinds that are never texts to run a model on."""

_FORMATS: Final = {
    "plan": PLAN,
    "ranking": RANKING,
    "statistics": STATISTICS,
    "evaluation": EVALUATION,
    "sweep": SWEEP,
    "trace": TRACE,
    "manifest": MANIFEST,
}
# A JSON object with all of these keys is of that kind; the first match wins.
_KEYS: Final = (
    (("sample_count", "think_expert_analytics"), PUBLISHED_STATISTICS),
    (("sample_count", "answer_expert_analytics"), PUBLISHED_STATISTICS),
    (("machine", "versions", "interrupted"), BENCH),
    (("sizes", "fits", "model_type"), INSPECTION),
    (("output", "layers", "provenance"), REMARK),
    (("job", "layers"), PARTIAL),
    (("peft_type",), ADAPTER),
    (("weight_map",), INDEX),
    (("model_type", "vocab_size"), CONFIG),
    (("architectures", "vocab_size"), CONFIG),
)
_FORMAT = re.compile(rb'"format"\s*:\s*"moe-surgery\.([a-z]+)"')
_IMATRIX: Final = b"general.type" + b"\x08\0\0\0" + b"\x07\0\0\0\0\0\0\0imatrix"  # key, type string, length
_LAYER_KEY = re.compile(r"(layer_)?[0-9]{1,5}", re.ASCII)


def kind_of(path: PathLike) -> Kind | None:
    """What the file or folder `path` is; None where it is unknown, missing or unreadable. Never raises.

    Reads the start of a file, a safetensors header, or a JSON text of at most 100 MB.
    """
    try:
        target = Path(path)
        if target.is_dir():
            if _is_checkpoint(target):
                return CHECKPOINT
            return ADAPTER if (target / ADAPTER_CONFIG).is_file() else None
        fd = open_regular(target)
        try:
            return _of_file(fd, os.fstat(fd).st_size)
        finally:
            os.close(fd)
    except (MoeSurgeryError, OSError, ValueError, RecursionError):
        return None


def wrong_kind(path: PathLike, wanted: str, kind: Kind) -> str:
    """The message for a file of `kind` passed where `wanted` is expected."""
    return f"{printable_path(path)}: is {kind.title}, not {wanted}; {kind.use}"


def check_kind(path: PathLike, wanted: str, *kinds: Kind) -> None:
    """Raise InvalidInputError where `path` is recognised as a kind other than `kinds`."""
    kind = kind_of(path)
    if kind is not None and kind not in kinds:
        raise InvalidInputError(wrong_kind(path, wanted, kind))


@contextmanager
def expecting(path: PathLike, wanted: str, *kinds: Kind) -> Iterator[None]:
    """Within the block, which reads `path` as `wanted` (one of `kinds`), an InvalidInputError says what the file is.

    Errors for a file of the right kind, or of an unknown one, pass through unchanged.
    """
    try:
        yield
    except InvalidInputError as error:
        kind = kind_of(path)
        if kind is None or kind in kinds:
            raise
        raise InvalidInputError(wrong_kind(path, wanted, kind)) from error


def expects(wanted: str, *kinds: Kind) -> Callable[[Read], Read]:
    """`expecting` around a function whose first parameter is `path`."""

    def decorate(function: Read) -> Read:
        @wraps(function)
        def read(path: PathLike, *args: Any, **kwargs: Any) -> Any:
            with expecting(path, wanted, *kinds):
                return function(path, *args, **kwargs)

        return cast(Read, read)

    return decorate


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(
        name.endswith(".safetensors") for name in os.listdir(folder)
    )


def _of_file(fd: int, size: int) -> Kind | None:
    head = os.pread(fd, HEAD_BYTES, 0)
    start = head.lstrip()
    if start.startswith(b"GGUF"):
        return IMATRIX if _IMATRIX in head else GGUF
    if _is_legacy_imatrix(head):
        return IMATRIX
    torch_archive = start.startswith(b"PK\x03\x04") and b"data.pkl" in start[:200]  # its first member
    if torch_archive or start.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return PICKLE
    if start[:15].lower().startswith((b"<!doctype html", b"<html")):
        return PAGE
    if head[7:9] == b"\0{":
        return _of_safetensors(fd, size, int.from_bytes(head[:8], "little"))
    if not start.startswith(b"{"):
        return None
    if match := _FORMAT.search(head[:4096]):  # where our writers put it
        return _FORMATS.get(match[1].decode())
    return _of_json(fd, size, head)


def _is_legacy_imatrix(head: bytes) -> bool:
    """Whether it begins with a number of entries, and the name of a weight with its length."""
    if len(head) < 8:
        return False
    entries, length = (int.from_bytes(head[at : at + 4], "little") for at in (0, 4))
    name = head[8 : 8 + length]
    return 1 <= entries <= 100_000 and 1 <= length <= 1024 and name.isascii() and name.endswith(b".weight")


def _of_safetensors(fd: int, size: int, length: int) -> Kind | None:
    if length > min(MAX_HEADER_BYTES, size - 8):
        return None
    root = json.loads(os.pread(fd, length, 8))
    metadata = root.get("__metadata__") if isinstance(root, dict) else None
    content = metadata.get("moe_surgery", "") if isinstance(metadata, dict) else ""
    return STATISTICS if '"moe-surgery.statistics"' in str(content) else WEIGHTS


def _of_json(fd: int, size: int, head: bytes) -> Kind | None:
    """A JSON object, or JSON lines, of which the first is read."""
    line, newline, rest = head.partition(b"\n")
    if newline and rest.lstrip()[:1] == b"{":
        root = _object(line)
        return RANKING if root is not None and _is_ranking(root) else None
    if size > MAX_BYTES:
        return None
    root = _object(head if size <= len(head) else os.pread(fd, size, 0))
    if root is None:
        return None
    name = str(root.get("format"))
    if name.startswith("moe-surgery."):
        return _FORMATS.get(name.removeprefix("moe-surgery."))
    if _is_ranking(root):
        return RANKING
    if _is_mapping(root):
        return MAPPING
    return next((kind for keys, kind in _KEYS if all(key in root for key in keys)), None)


def _object(raw: bytes) -> Mapping[str, object] | None:
    root = parse_json(raw, where="", allow_floats=True)
    return root if isinstance(root, dict) and root else None


def _is_ranking(root: Mapping[str, object]) -> bool:
    """Experts by layer: {"layer_0": [31, 9, ...], ...} or {"0": [31, 9, ...], ...}."""
    return all(
        _LAYER_KEY.fullmatch(key) and isinstance(row, list) and all(type(expert) is int for expert in row)
        for key, row in root.items()
    )


def _is_mapping(root: Mapping[str, object]) -> bool:
    """{"0": {"<old>": <new>, ...}, ...}."""
    return all(
        layer.isdecimal() and isinstance(row, dict) and all(type(new) is int for new in row.values())
        for layer, row in root.items()
    )
