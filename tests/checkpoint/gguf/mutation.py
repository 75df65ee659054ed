"""Random mutations of valid GGUF files: each is read or refused in one line, never a crash.

    python -m tests.checkpoint.gguf.mutation --seconds 600

Where llama.cpp's reader is at hand (`tests/support/ggml_reader.py`) it must read what we read; what it says
otherwise is listed with the file, which stays in --keep. Files with ik_llama.cpp's types are not asked about.
"""

from __future__ import annotations

import argparse
import random
import struct
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moe_surgery.checkpoint.gguf.header import GgufHeader, read_gguf_header, read_value
from moe_surgery.errors import InvalidInputError
from tests.support.ggml_reader import GgmlReader, ggml_library
from tests.support.gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I32,
    STRING,
    U8,
    U16,
    array,
    file,
    kv,
    tensor,
    text,
    u32,
)
from tests.support.sources import MemoryFile, MemorySource

from .corpus import ACCEPT, CASES, VALID

MAINLINE_TYPES = 100
"""llama.cpp's numbers lie below, ik_llama.cpp's above."""
SMALL = (0, 1, 2, 3, 4, 5, 8, 9, 12, 13, 16, 31, 32, 63, 64, 127, 128, 255, 256)
POWERS = (16, 30, 31, 32, 61, 62, 63, 64)
INTERESTING = [*SMALL, *(n for p in POWERS for n in ((1 << p) - 32, (1 << p) - 1, 1 << p, (1 << p) + 1))]
"""Numbers around the limits of the format; cut to the width that they are written with."""


def seeds() -> list[bytes]:
    """Valid files, small, with everything the format has."""
    every = [
        kv("u8", U8, b"\1"),
        kv("u16", U16, b"\1\0"),
        u32("u32", 7),
        kv("i32", I32, b"\xff" * 4),
        kv("f32", F32, struct.pack("<f", 1.5)),
        kv("f64", F64, struct.pack("<d", 1.5)),
        kv("flag", BOOL, b"\1"),
        kv("text", STRING, text("abc")),
        kv("texts", ARRAY, array(STRING, 2, text("ab") + text("c"))),
        kv("numbers", ARRAY, array(I32, 2, bytes(8))),
        kv("flags", ARRAY, array(BOOL, 2, b"\0\1")),
    ]
    shapes = [tensor("four", [2, 1, 2, 1], 0, 0), tensor("q8", [64], 8, 64), tensor("none", [0, 4], 0, 192)]
    wide = [u32("general.alignment", 64), *every]
    return [
        VALID,
        file(every, shapes[:1], bytes(64)),
        file(wide, shapes, bytes(192), alignment=64),
        file(every, version=2),
        file([], shapes[:1], bytes(64)),
        *(case.blob for case in CASES if case.ours == ACCEPT and len(case.blob) < 2000),
    ]


def mutated(blob: bytes, random_numbers: random.Random) -> bytes:
    """`blob` with one to four changes."""
    raw = bytearray(blob)
    for _ in range(random_numbers.choice((1, 1, 1, 2, 2, 3, 4))):
        if not raw:
            break
        at, kind = random_numbers.randrange(len(raw)), random_numbers.randrange(8)
        if kind == 0:
            raw[at] ^= 1 << random_numbers.randrange(8)
        elif kind == 1:
            raw[at] = random_numbers.randrange(256)
        elif kind in (2, 3):
            code = random_numbers.choice("BHIQ")
            value = random_numbers.choice(INTERESTING) & (1 << 8 * struct.calcsize(code)) - 1
            packed = struct.pack(f"<{code}", value)
            raw[at : at + len(packed)] = packed
        elif kind == 4:
            del raw[at : at + random_numbers.choice((1, 4, 8, random_numbers.randrange(1, 64)))]
        elif kind == 5:
            raw[at:at] = bytes(
                random_numbers.randrange(256) for _ in range(random_numbers.choice((1, 4, 8, 32)))
            )
        elif kind == 6:
            length = random_numbers.randrange(1, 64)
            other = random_numbers.randrange(len(raw))
            raw[at:at] = raw[other : other + length]
        else:
            del raw[at:]
    return bytes(raw)


@dataclass
class Result:
    """What a run found. `accepted_alone` are files that we read and llama.cpp does not."""

    files: int = 0
    read: int = 0
    asked: int = 0
    aborts: int = 0
    accepted_alone: list[bytes] = field(default_factory=list)


def run(seed: int, *, count: int | None, seconds: float, reader: GgmlReader | None, path: Path) -> Result:
    """Mutate until `count` files or `seconds` are over. Raises whatever is not a clean refusal."""
    random_numbers, result, corpus = random.Random(seed), Result(), seeds()
    end = time.monotonic() + seconds
    while result.files != count and time.monotonic() < end:
        blob = mutated(random_numbers.choice(corpus), random_numbers)
        result.files += 1
        header = parsed(blob)
        if header is None:
            continue
        result.read += 1
        if reader is None or any(t.type.number > MAINLINE_TYPES for t in header.tensors.values()):
            continue
        path.write_bytes(blob)
        result.asked += 1
        if not reader.accepts(path):
            result.accepted_alone.append(blob)
    result.aborts = reader.aborts if reader else 0
    return result


def parsed(blob: bytes) -> GgufHeader | None:
    """The header, with every value read and every tensor inside the file; None where it is refused in one line."""
    source = MemorySource("model.gguf", MemoryFile(blob))
    try:
        header = read_gguf_header(source)
    except InvalidInputError as error:
        if str(error).isprintable():
            return None
        raise
    for entry in header.metadata.values():
        read_value(source, entry)
    for info in header.tensors.values():
        source.read(info.offset, info.nbytes)
    return header


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="Folder for files that we read and llama.cpp does not.")
    options = parser.parse_args(arguments)
    library = ggml_library()
    reader = GgmlReader(library) if library else None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutated.gguf"
        result = run(options.seed, count=None, seconds=options.seconds, reader=reader, path=path)
    if reader:
        reader.close()
    print(
        f"{result.files:,} files, {result.read:,} read, no crash; llama.cpp "
        + (
            f"asked about {result.asked:,}, {len(result.accepted_alone)} of them it does not read "
            f"({result.aborts} aborts)"
            if reader
            else "not at hand"
        )
    )
    if options.keep and result.accepted_alone:
        options.keep.mkdir(parents=True, exist_ok=True)
        for number, blob in enumerate(result.accepted_alone):
            (options.keep / f"{number}.gguf").write_bytes(blob)
    return 1 if result.accepted_alone else 0


if __name__ == "__main__":
    raise SystemExit(main())
