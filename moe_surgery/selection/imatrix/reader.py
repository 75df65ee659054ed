"""Reads importance matrices in the form of GGUF, whatever the file is called, and hands on the legacy form.

Source: tools/imatrix/imatrix.cpp of ggml-org/llama.cpp. Every weight has two tensors: `<name>.in_sum2` [inputs, E]
and `<name>.counts` [1, E] (in ggml's order; [inputs] and [1] for a dense one), both F32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash

from moe_surgery.checkpoint.files import printable_path
from moe_surgery.checkpoint.gguf.model_file import GgufModel, GgufTensor
from moe_surgery.checkpoint.kinds import GGUF, IMATRIX, expecting
from moe_surgery.checkpoint.local_file import LocalFile, LocalFolder
from moe_surgery.checkpoint.source import ByteSource
from moe_surgery.checkpoint.text import printable
from moe_surgery.errors import InvalidInputError
from moe_surgery.selection.arguments import PathLike
from moe_surgery.selection.imatrix.legacy import parse_legacy
from moe_surgery.selection.imatrix.matrix import Entry, Imatrix

__all__ = ["COUNTS", "SUMS", "load_imatrix"]

SUMS: Final = ".in_sum2"
COUNTS: Final = ".counts"
_DIGEST_BYTES: Final = 8 << 20


def load_imatrix(path: PathLike) -> Imatrix:
    """The importance matrix in the file `path`, in either form. Values are float32 in the mapped file.

    Raises InvalidInputError for a malformed file and any other one (a quantised model may be called
    MODEL-imatrix.gguf), OutputError where it cannot be read.
    """
    with expecting(path, "an importance matrix", IMATRIX, GGUF):
        return _load(Path(path))


def _load(file: Path) -> Imatrix:
    with LocalFile(file) as source:
        magic = source.read(0, min(4, source.size))
        digest = _digest(source)
        if magic != b"GGUF":
            return parse_legacy(_mapped(source), source.where, digest)
    with GgufModel.open(LocalFolder(file.parent), file.name) as model:
        return _of_gguf(model, printable_path(file), digest)


def _of_gguf(model: GgufModel, where: str, digest: str) -> Imatrix:
    kind = model.value("general.type")
    if kind != "imatrix":
        architecture = model.value("general.architecture")
        what = f"a model ({printable(str(architecture))})" if architecture else "a GGUF file of another kind"
        raise InvalidInputError(
            f"{where}: is {what}, not an importance matrix (general.type is {printable(str(kind))}); such a file "
            "comes from llama-imatrix, or lies beside quantised models as imatrix.gguf or imatrix.dat"
        )
    # Other tensors, which some writers add, are ignored, as llama.cpp does.
    names = list(
        dict.fromkeys(n.removesuffix(s) for n in model.tensors for s in (SUMS, COUNTS) if n.endswith(s))
    )
    if not names:
        raise InvalidInputError(f"{where}: is an importance matrix without entries")
    data = {name: _mapped(shard.source) for name, shard in model.shards.items()}
    return Imatrix(
        where,
        {name: _entry(model, name, data, where) for name in names},
        _texts(model.value("imatrix.datasets")),
        _number(model.value("imatrix.chunk_count")),
        _number(model.value("imatrix.chunk_size")),
        digests=(digest,),
    )


def _entry(model: GgufModel, name: str, data: Mapping[str, npt.NDArray[np.uint8]], where: str) -> Entry:
    def values(suffix: str) -> tuple[GgufTensor, npt.NDArray[np.float32]]:
        tensor = model.tensors.get(name + suffix)
        if tensor is None:
            raise InvalidInputError(f"{where}: '{printable(name)}' has no {suffix[1:]}")
        if tensor.type.name != "F32":
            raise InvalidInputError(
                f"{where}: tensor '{printable(name + suffix)}' is {tensor.type.name}, not F32"
            )
        raw = data[tensor.shard][tensor.offset : tensor.offset + tensor.nbytes]
        array = raw.view(np.float32).reshape(-1, tensor.shape[-1])
        if not np.isfinite(array).all() or (array < 0).any():
            raise InvalidInputError(
                f"{where}: tensor '{printable(name + suffix)}' holds values that are negative or not finite: the "
                "matrix is damaged; make it again"
            )
        return tensor, array

    _, sums = values(SUMS)
    tensor, counts = values(COUNTS)
    if counts.shape == (1, len(sums)) and len(sums) > 1:
        counts = counts.T  # written without the dimension of 1
    if counts.shape != (len(sums), 1):
        raise InvalidInputError(
            f"{where}: tensor '{printable(tensor.name)}' has {counts.size} counts, but '{printable(name + SUMS)}' "
            f"has {len(sums)} rows"
        )
    whole = np.rint(counts[:, 0])
    if (whole != counts[:, 0]).any():
        raise InvalidInputError(
            f"{where}: tensor '{printable(tensor.name)}' holds counts that are not whole numbers"
        )
    if (sums[whole == 0] != 0).any():
        raise InvalidInputError(f"{where}: '{printable(name)}' has sums over no token")
    return Entry(sums, whole.astype(np.int64))


def _mapped(source: ByteSource) -> npt.NDArray[np.uint8]:
    """All bytes of a local file; the mapping lives as long as arrays over it."""
    if source.size == 0:
        raise InvalidInputError(f"{source.where}: is empty")
    mapped: Any = source.map()
    return np.frombuffer(source.read(0, source.size) if mapped is None else mapped, np.uint8)


def _digest(source: ByteSource) -> str:
    digest = xxhash.xxh3_128()
    for offset in range(0, source.size, _DIGEST_BYTES):
        digest.update(source.read(offset, min(_DIGEST_BYTES, source.size - offset)))
    return digest.hexdigest()


def _texts(value: object) -> tuple[str, ...]:
    return (
        tuple(printable(text) for text in value if isinstance(text, str)) if isinstance(value, list) else ()
    )


def _number(value: object) -> int:
    return value if type(value) is int and value > 0 else 0
