"""`surgery.json`: the provenance of an output, and the digests of its files and tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import xxhash

from moe_surgery.checkpoint.files import printable_path, read_small_file
from moe_surgery.checkpoint.source import Folder, read_optional
from moe_surgery.checkpoint.strict_json import parse_json
from moe_surgery.checkpoint.text import describe_value, printable
from moe_surgery.errors import InvalidInputError, OutputError, VerificationError
from moe_surgery.formats.expert_format import ExpertFormat, format_by_name
from moe_surgery.selection.plan import Plan, plan_from_dict
from moe_surgery.surgery.names import MANIFEST_NAME
from moe_surgery.version import __version__

if TYPE_CHECKING:
    from moe_surgery.engine.run import WrittenFile
    from moe_surgery.surgery.gguf.program import GgufPruneProgram
    from moe_surgery.surgery.program import OutputShard, Program

__all__ = [
    "FileRecord",
    "Manifest",
    "TensorRecord",
    "find_manifest",
    "is_ours",
    "load_manifest",
    "manifest_bytes",
    "provenance_of",
    "shard_record",
    "with_file",
]

MANIFEST_FORMAT = "moe-surgery.manifest"
VERSION = 1
MAX_BYTES = 200_000_000
_BLANK = "0" * 32

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One output tensor; `xxh3_128` is the digest of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One output file. `tensors` is empty for anything but a shard."""

    size: int
    xxh3_128: str
    tensors: Mapping[str, TensorRecord] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The parsed manifest. `expert_format` is that of the output.

    `origin` holds the unchecked entries on the source, apart from its files; `repair` those on repaired tensors,
    None where there are none.
    """

    plan: Plan
    expert_format: ExpertFormat
    sources: tuple[Mapping[str, object], ...]
    files: Mapping[str, FileRecord]
    tool: str
    origin: Mapping[str, object] = field(default_factory=dict)
    repair: Mapping[str, object] | None = None

    @property
    def repaired(self) -> tuple[str, ...]:
        """The tensors that differ from the source."""
        names = (self.repair or {}).get("tensors")
        return tuple(n for n in names if isinstance(n, str)) if isinstance(names, list) else ()

    @property
    def provenance(self) -> dict[str, object]:
        """See `provenance_of`."""
        return provenance_of(self.plan, self.repair)


def provenance_of(plan: Plan, repair: Mapping[str, object] | None) -> dict[str, object]:
    """The plan's provenance, for a repaired checkpoint with a digest of its repair: models that differ in either are
    different ones."""
    if not repair:
        return dict(plan.provenance)
    content = json.dumps(repair, sort_keys=True).encode()
    return {**plan.provenance, "repair": xxhash.xxh3_128_hexdigest(content)}


def shard_record(shard: OutputShard, written: WrittenFile) -> FileRecord:
    """The manifest's record of a finished shard."""
    tensors = {
        t.name: TensorRecord(t.dtype, t.shape, digest)
        for t, digest in zip(shard.tensors, written.tensors, strict=True)
    }
    return FileRecord(shard.nbytes, written.digest, tensors)


def manifest_bytes(
    program: Program | GgufPruneProgram,
    files: Mapping[str, FileRecord],
    conversion: Mapping[str, object] | None,
) -> bytes:
    """The manifest of a finished output; the same program and bytes give the same manifest.

    The manifest's own digest covers all of its bytes, with the 32 digits of the digest read as zeros.
    """
    document = {
        "format": MANIFEST_FORMAT,
        "version": VERSION,
        "tool": {"name": "moe-surgery", "version": __version__},
        "source": {
            **program.origin,
            "layout": program.layout,
            "files": [asdict(s) for s in program.sources],
        },
        "expert_storage": program.expert_format.name,
        "conversion": conversion,
        "plan": program.plan.as_dict(),
        **({"repair": repair} if (repair := getattr(program, "repair", None)) else {}),
        "files": dict(sorted(files.items())),
    }
    return _sealed(document)


def with_file(raw: bytes, name: str, content: bytes) -> bytes:
    """The valid manifest `raw` with `content` as the file `name`."""
    document = parse_json(raw, where=MANIFEST_NAME, allow_floats=True)
    assert isinstance(document, dict)
    del document["digest"]
    record = FileRecord(len(content), xxhash.xxh3_128_hexdigest(content))
    document["files"] = dict(sorted({**document["files"], name: asdict(record)}.items()))
    return _sealed(document)


def _sealed(document: Mapping[str, object]) -> bytes:
    """The document as JSON, encoded piece by piece: a manifest of many tensors is large."""
    text = bytearray(f'{{\n "digest": "{_BLANK}",'.encode())
    start = text.index(_BLANK.encode())
    pieces = json.JSONEncoder(indent=1, ensure_ascii=False, default=_fields).iterencode(document)
    assert next(pieces)[0] == "{"
    for piece in pieces:
        text += piece.encode()
    text += b"\n"
    text[start : start + len(_BLANK)] = xxhash.xxh3_128_hexdigest(text).encode()
    return bytes(text)


def _fields(record: object) -> dict[str, object]:
    """A record as the encoder writes it."""
    if not isinstance(record, (FileRecord, TensorRecord)):
        raise TypeError(f"{type(record).__name__} is not part of a manifest")
    return {f.name: getattr(record, f.name) for f in fields(record)}


def is_ours(folder: Path) -> bool:
    """Whether `folder` has a manifest of this package; its digest is not checked.

    Raises OutputError where the manifest exists but cannot be read: no permission, a device error.
    """
    path = folder / MANIFEST_NAME
    try:
        path.lstat()
        raw = read_small_file(path, limit=MAX_BYTES, what="a manifest")
        root = parse_json(raw, where=MANIFEST_NAME, allow_floats=True)
    except (FileNotFoundError, NotADirectoryError, InvalidInputError):
        return False
    except OSError as error:
        raise OutputError(f"{printable_path(path)}: cannot open: {error.strerror}") from None
    return isinstance(root, dict) and root.get("format") == MANIFEST_FORMAT


def find_manifest(files: Folder) -> Manifest | None:
    """The manifest of the checkpoint in `files`, None where there is none, or one of another program.

    Raises as `load_manifest` for a manifest of this package.
    """
    raw = read_optional(files, MANIFEST_NAME, limit=MAX_BYTES, what="a manifest")
    where = printable_path(files.path / MANIFEST_NAME)
    try:
        root = None if raw is None else parse_json(raw, where=where, allow_floats=True)
    except InvalidInputError:
        return None
    if raw is None or not isinstance(root, dict) or root.get("format") != MANIFEST_FORMAT:
        return None
    return _checked(raw, root, where)


def load_manifest(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises VerificationError if its digest does not match, InvalidInputError if it is not
    a manifest or of an unknown version, OutputError if it cannot be read.
    """
    where = printable_path(path)
    raw = read_small_file(path, limit=MAX_BYTES, what="a manifest")
    root = parse_json(raw, where=where, allow_floats=True)
    if not isinstance(root, dict) or root.get("format") != MANIFEST_FORMAT:
        raise InvalidInputError(f"{where}: not a manifest of moe-surgery")
    return _checked(raw, root, where)


def _checked(raw: bytes, root: Mapping[str, object], where: str) -> Manifest:
    """The manifest parsed from `raw` as `root`; raises as `load_manifest`."""
    if root.get("version") != VERSION:
        raise InvalidInputError(f"{where}: manifest version {str(root.get('version'))[:20]} is not supported")
    digest = str(root.get("digest"))
    blank = raw.replace(digest.encode(), _BLANK.encode(), 1)
    if xxhash.xxh3_128_hexdigest(blank) != digest:
        raise VerificationError(f"{where}: the manifest was modified: its digest does not match")
    try:
        return _parsed(root, where)
    except (ValueError, InvalidInputError) as error:
        raise InvalidInputError(f"{where}: malformed manifest: {error}") from None


def _parsed(root: Mapping[str, object], where: str) -> Manifest:
    """Checks the type of every field, and that file names stay inside the folder."""
    files = {}
    for name, record in _get(root, "files", dict).items():
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise ValueError(f"{printable(name)} is not a plain file name")
        tensors = {
            tensor: TensorRecord(
                _get(t, "dtype", str), tuple(_get(t, "shape", list)), _get(t, "xxh3_128", str)
            )
            for tensor, t in _get(record, "tensors", dict).items()
        }
        files[name] = FileRecord(_get(record, "size", int), _get(record, "xxh3_128", str), tensors)
    origin = _get(root, "source", dict)
    sources = _get(origin, "files", list)
    for source in sources:
        _get(source, "name", str)
        _get(source, "header_digest", str)
    tool = _get(root, "tool", dict)
    return Manifest(
        plan_from_dict(_get(root, "plan", dict), where),
        format_by_name(_get(root, "expert_storage", str)),
        tuple(sources),
        files,
        f"{_get(tool, 'name', str)} {_get(tool, 'version', str)}",
        {key: value for key, value in origin.items() if key not in ("layout", "files")},
        _get(root, "repair", dict) if "repair" in root else None,
    )


def _get(holder: object, key: str, kind: type[Value]) -> Value:
    value = holder.get(key) if isinstance(holder, Mapping) else None
    if not isinstance(value, kind):
        raise ValueError(f"{key} is {describe_value(value)}")
    return value
