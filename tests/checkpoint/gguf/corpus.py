"""Broken and unusual GGUF files as byte literals, and what llama.cpp's reader says of each."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from tests.support.gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U8,
    U16,
    U32,
    U64,
    array,
    file,
    kv,
    tensor,
    text,
    u32,
)

ACCEPT = "accept"
F32_TYPE, F16_TYPE, Q8_0_TYPE, Q4_K_TYPE = 0, 1, 8, 12
BIG = 1 << 63


@dataclass(frozen=True)
class Case:
    """One file. `ours` is ACCEPT or a pattern of our message; `llama` is whether llama.cpp reads the header."""

    id: str
    blob: bytes
    ours: str
    llama: bool = False


ARCH = kv("general.architecture", STRING, text("gpt-oss"))
ONE = file([ARCH], [tensor("t", [8], F32_TYPE, 0)], bytes(32))
VALID = file(
    [
        ARCH,
        u32("general.alignment", 32),
        kv("tokenizer.ggml.tokens", ARRAY, array(STRING, 3, text("a") + text("") + text(b"\xff"))),
        kv("x.numbers", ARRAY, array(I32, 2, struct.pack("<ii", -1, 2))),
        kv("x.flag", BOOL, b"\1"),
    ],
    [
        tensor("blk.0.ffn_up_exps.weight", [256, 2, 3], Q4_K_TYPE, 0),
        tensor("a", [3], F32_TYPE, 864),
        tensor("none", [0], F32_TYPE, 896),
    ],
    bytes(range(224)) * 4,
)


def entry(raw: bytes) -> bytes:
    """A file with one metadata entry more."""
    return file([ARCH, raw])


def row(raw: bytes, nbytes: int = 64) -> bytes:
    """A file with one tensor."""
    return file([ARCH], [raw], bytes(nbytes))


def announced(tensors: int, entries: int) -> bytes:
    return file([ARCH], [], bytes(64), counts=(tensors, entries))


FRAMING = [
    Case("empty", b"", "the file needs 4 bytes at 0, but the file ends at 0: it is cut off"),
    Case("three-bytes", b"GGU", "cut off"),
    Case("other-magic", b"GGML" + bytes(60), "the file does not begin with GGUF$"),
    Case("ggjt", b"tjgg" + bytes(60), "a GGML file of 2023"),
    Case("lfs-pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
    Case("html", b"<!DOCTYPE html><html>", "an HTML page"),
    Case("version-0", file([ARCH], version=0), "is GGUF version 0; versions 2 and 3 are known"),
    Case("version-1", file([ARCH], version=1), "GGUF version 1 of 2023"),
    Case("version-2", file([ARCH], version=2), ACCEPT, True),
    Case("version-4", file([ARCH], version=4), "is GGUF version 4; versions 2 and 3"),
    Case("big-endian", b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is a big-endian GGUF file"),
    Case("nothing-in-it", file(), ACCEPT, True),
    Case("no-padding-without-tensors", file([ARCH]).rstrip(b"\0"), ACCEPT, True),
    Case("tensors-2^63", announced(BIG, 1), "announces 1 metadata entries and 9,223,372,036,854,775,808 ten"),
    Case("tensors-2^64-1", announced(2 * BIG - 1, 1), "announces"),
    Case("entries-2^63", announced(0, BIG), "announces"),
    Case("entries-2^64-1", announced(0, 2 * BIG - 1), "announces"),
    Case(
        "one-tensor-too-many",
        file([ARCH], [tensor("t", [8], F32_TYPE, 0)], counts=(2, 1), alignment=1),
        "tensor 1 of the table needs 8 bytes",
    ),
    Case("one-entry-too-many", file([ARCH], [], bytes(14), counts=(0, 2)), "metadata entry 1"),
    Case("more-tensors-than-bytes", announced(100, 1), "100 tensors, but has"),
    Case("over-our-limit-of-tensors", announced((1 << 18) + 1, 1), "at most 65,536 and 262,144 are read"),
    Case("bytes-behind-the-data", ONE + b"more", ACCEPT, True),
]

KEYS = [
    Case("empty-key", entry(kv("", U8, b"\1")), "metadata entry 1 has an empty key"),
    Case("key-twice", file([u32("k", 1), u32("k", 1)]), "key 'k' occurs twice"),
    Case("key-twice-two-types", file([u32("k", 1), kv("k", U8, b"\1")]), "key 'k' occurs twice"),
    Case("key-of-65535-bytes", entry(kv("k" * 65535, U8, b"\1")), ACCEPT, True),
    Case("key-of-65536-bytes", entry(kv("k" * 65536, U8, b"\1")), "entry 1 has a string of 65,536; at", True),
    Case(
        "key-length-2^63", entry(struct.pack("<Q", BIG) + bytes(20)), "a string of 9,223,372,036,854,775,808"
    ),
    Case(
        "key-length-2^64-1", entry(struct.pack("<Q", 2 * BIG - 1) + bytes(20)), "a string of 18,446,744,073"
    ),
    Case("key-beyond-the-end", entry(struct.pack("<Q", 4096) + b"k"), "metadata entry 1 needs 4,096 bytes"),
    Case("key-is-no-utf8", entry(kv(b"\xff\xfe", U8, b"\1")), ACCEPT, True),
    Case(
        "terminal-escape-in-key", entry(kv("\x1b[2J", 99, b"\1")), r"key '\\x1b\[2J' has the unknown type 99"
    ),
    Case("type-13", entry(kv("k", 13, bytes(8))), "key 'k' has the unknown type 13"),
    Case("type-minus-1", entry(kv("k", 2**32 - 1, bytes(8))), "key 'k' has the unknown type 4294967295"),
    Case("value-cut-off", file([ARCH, kv("k", U64, bytes(7))], alignment=1), "key 'k' needs 8 bytes"),
    Case("flag-of-2", entry(kv("k", BOOL, b"\2")), ACCEPT, True),
    Case("string-2^63", entry(kv("k", STRING, struct.pack("<Q", BIG))), "key 'k' has a string of 9,223,372"),
    Case(
        "string-over-1-Gi",
        entry(kv("k", STRING, struct.pack("<Q", (1 << 30) + 1))),
        "a string of 1,073,741,825",
    ),
    Case(
        "string-of-1-Gi", entry(kv("k", STRING, struct.pack("<Q", 1 << 30))), "key 'k' needs 1,073,741,824 by"
    ),
]

ARRAYS = [
    Case("empty-array", entry(kv("k", ARRAY, array(U8, 0, b""))), ACCEPT, True),
    Case(
        "array-of-arrays", entry(kv("k", ARRAY, array(ARRAY, 1, array(U8, 1, b"\1")))), "an array of arrays"
    ),
    Case("empty-array-of-arrays", entry(kv("k", ARRAY, array(ARRAY, 0, b""))), "an array of arrays"),
    Case(
        "array-of-type-13", entry(kv("k", ARRAY, array(13, 1, bytes(8)))), "has items of the unknown type 13"
    ),
    Case("empty-array-of-type-13", entry(kv("k", ARRAY, array(13, 0, b""))), "unknown type 13"),
    Case("array-cut-off", entry(kv("k", ARRAY, array(F32, 999, bytes(8)))), "key 'k' needs 3,996 bytes"),
    Case("array-2^63", entry(kv("k", ARRAY, array(U64, BIG, b""))), "an array of 9,223,372,036,854,775,808"),
    Case("array-2^61-wraps", entry(kv("k", ARRAY, array(U64, 1 << 61, b""))), "an array of 2,305,843"),
    Case(
        "array-over-1-Gi",
        entry(kv("k", ARRAY, array(U8, (1 << 30) + 1, b""))),
        "an array of 1,073,741,825; at",
    ),
    Case(
        "strings-cut-off",
        entry(kv("k", ARRAY, array(STRING, 1 << 30, text("a")))),
        "key 'k' needs 8,589,934,592",
    ),
    Case(
        "last-string-cut-off",
        entry(kv("k", ARRAY, array(STRING, 2, text("a") + struct.pack("<Q", 99)))),
        "needs 99",
    ),
    Case(
        "string-in-array-2^63",
        entry(kv("k", ARRAY, array(STRING, 1, struct.pack("<Q", BIG)))),
        "a string of 9,2",
    ),
]

ALIGNMENT = [
    *(
        Case(
            f"alignment-{n}",
            file([u32("general.alignment", n)]),
            f"'general.alignment' is {n}, not a power",
            llama,
        )
        for n, llama in [
            (0, False),
            (1, True),
            (3, False),
            (8, True),
            (24, False),
            (48, False),
            (2**32 - 1, False),
        ]
    ),
    *(
        Case(
            f"alignment-{n}",
            file(
                [u32("general.alignment", n)],
                [tensor("a", [1], F32_TYPE, 0), tensor("b", [1], F32_TYPE, n)],
                bytes(2 * n),
                alignment=n,
            ),
            ACCEPT,
            True,
        )
        for n in (16, 32, 64, 4096)
    ),
    Case("alignment-2^31", file([u32("general.alignment", 1 << 31)]), ACCEPT, True),
    Case(
        "alignment-2^31-with-a-tensor",
        file([u32("general.alignment", 1 << 31)], [tensor("t", [1], F32_TYPE, 0)], bytes(64)),
        "tensor 't' ends at byte 2,147,483,652, but the file at",
    ),
    *(
        Case(
            f"alignment-as-{name}",
            file([kv("general.alignment", kind, raw)]),
            f"is of type {name}, llama.cpp needs u32",
        )
        for name, kind, raw in [
            ("u16", U16, b"\x20\0"),
            ("i32", I32, b"\x20\0\0\0"),
            ("u64", U64, b"\x20" + bytes(7)),
            ("f32", F32, struct.pack("<f", 32)),
            ("str", STRING, text("32")),
        ]
    ),
    Case(
        "alignment-as-an-array",
        file([kv("general.alignment", ARRAY, array(U32, 1, b"\x20\0\0\0"))]),
        "is of type arr, llama.cpp needs u32",
    ),
    Case(
        "laid-out-by-32-with-key-64",
        file([u32("general.alignment", 64)], [tensor("a", [1], 0, 0), tensor("b", [1], 0, 32)], bytes(128)),
        "tensor 'b' has its data at 32, expected 64",
    ),
]

NAMES = [
    Case("name-of-63-bytes", row(tensor("n" * 63, [8], F32_TYPE, 0)), ACCEPT, True),
    Case(
        "name-of-64-bytes",
        row(tensor("n" * 64, [8], F32_TYPE, 0)),
        "has a name of 64 bytes; llama.cpp allows 63",
    ),
    Case("name-of-63-characters", row(tensor("é" * 63, [8], F32_TYPE, 0)), "a name of 126 bytes"),
    Case("empty-name", row(tensor("", [8], F32_TYPE, 0)), ACCEPT, True),
    Case("name-with-a-zero-byte", row(tensor("a\0b", [8], F32_TYPE, 0)), "a zero byte in its name", True),
    Case(
        "name-length-2^63",
        row(struct.pack("<Q", BIG) + bytes(60)),
        "tensor 0 of the table has a name of 9,22",
    ),
    Case(
        "tensor-twice",
        file([], [tensor("t", [8], F32_TYPE, 0), tensor("t", [8], F32_TYPE, 32)], bytes(64)),
        "tensor 't' occurs twice",
    ),
    Case("terminal-escape-in-name", row(tensor("\x1b[2J", [8], 4, 0)), r"tensor '\\x1b\[2J' has type 4"),
]

SHAPES = [
    Case("no-dimensions", row(tensor("t", [], F32_TYPE, 0)), ACCEPT, True),
    Case("four-dimensions", row(tensor("t", [2, 1, 2, 2], F32_TYPE, 0)), ACCEPT, True),
    Case("five-dimensions", row(tensor("t", [1] * 5, F32_TYPE, 0)), "has 5 dimensions; llama.cpp allows 4"),
    Case("2^32-1-dimensions", row(text("t") + b"\xff" * 4 + bytes(40)), "has 4,294,967,295 dimensions"),
    Case("dimension-2^63", row(tensor("t", [BIG], U8, 0)), "has an impossible shape"),
    Case("dimension-2^64-1", row(tensor("t", [2 * BIG - 1], F32_TYPE, 0)), "has an impossible shape"),
    Case("product-2^64", row(tensor("t", [1 << 32, 1 << 32], F32_TYPE, 0)), "has an impossible shape"),
    Case(
        "product-wraps-to-4",
        row(tensor("t", [4194305, 4194305, 211106198978564], 0, 0)),
        "has an impossible shape: ",
    ),
    Case("zero-beside-2^63-1", row(tensor("t", [BIG - 1, 0, 2], F32_TYPE, 0)), "has an impossible shape"),
    Case(
        "product-then-zero", row(tensor("t", [1 << 62, 1 << 62, 0], F32_TYPE, 0)), "has an impossible shape: "
    ),
    Case(
        "zero-then-product",
        row(tensor("t", [0, 1 << 62, 1 << 62], F32_TYPE, 0)),
        "has an impossible shape",
        True,
    ),
    Case("bytes-overflow", row(tensor("t", [1 << 62], 28, 0)), "has an impossible shape"),
    Case(
        "2^62-bytes", row(tensor("t", [1 << 60], F32_TYPE, 0)), "tensor 't' ends at byte 4,611,686,018", True
    ),
    Case(
        "half-a-block",
        row(tensor("t", [16, 2], Q8_0_TYPE, 0), 96),
        "rows of 16 values, not a multiple of the 32 of Q8",
    ),
    Case("block-of-256", row(tensor("t", [32], Q4_K_TYPE, 0), 160), "not a multiple of the 256 of Q4_K"),
]

TYPES = [
    *(
        Case(f"type-{n}", row(tensor("t", [256], n, 0), 4096), f"tensor 't' has type {n}: {why}", llama)
        for n, why, llama in [
            (4, "a type that llama.cpp removed in 2023", False),
            (5, "a type that llama.cpp removed in 2023", False),
            (9, "a type of activations", True),
            (15, "a type of activations", True),
            (31, "a repacked type", False),
            (36, "I2_S of BitNet", False),
            (38, "a repacked type", False),
            (43, "unknown", False),
            (99, "a type of activations", False),
            (142, "a type that ik_llama.cpp removed", False),
            (200, "unknown", False),
            (2**31, "unknown", False),
            (2**32 - 1, "unknown", False),
        ]
    ),
    Case("ik-type-with-row-header", row(tensor("t", [256, 2], 144, 0), 288), ACCEPT),
    Case("ik-type-interleaved", row(tensor("t", [256, 4, 3], 214, 0), 2528), ACCEPT),
    Case(
        "three-rows-of-four",
        row(tensor("t", [256, 3, 4], 214, 0), 2528),
        "not a multiple of the 4 that Q6_K_R4",
    ),
    Case("no-rows-of-row-headers", row(tensor("t", [0, 4], 144, 0)), ACCEPT),
]

TWO = [tensor("a", [3], F32_TYPE, 0), tensor("b", [3], F32_TYPE, 32)]


def two(first: int, second: int, nbytes: int = 128) -> bytes:
    return file([], [tensor("a", [8], F32_TYPE, first), tensor("b", [8], F32_TYPE, second)], bytes(nbytes))


OFFSETS = [
    Case("in-order", two(0, 32), ACCEPT, True),
    Case("same-place", two(0, 0), "tensor 'b' has its data at 0, expected 32"),
    Case("overlap", two(0, 16), "tensor 'b' has its data at 16, expected 32"),
    Case("hole", two(0, 64), "tensor 'b' has its data at 64, expected 32"),
    Case("reversed", two(32, 0), "tensor 'a' has its data at 32, expected 0"),
    Case("begins-late", two(32, 64), "tensor 'a' has its data at 32, expected 0"),
    Case("offset-2^63", two(0, BIG), "tensor 'b' has its data at 9,223,372,036,854,775,808, expected 32"),
    Case("offset-2^64-32", two(2 * BIG - 32, 0), "tensor 'a' has its data at 18,446,744,073,709,551,584"),
    Case(
        "not-padded",
        file([], [tensor("a", [3], 0, 0), tensor("b", [3], 0, 12)], bytes(64)),
        "at 12, expected 32",
    ),
    Case("last-padding-missing", file([], TWO, bytes(44)), ACCEPT, True),
    Case(
        "last-byte-missing",
        file([], TWO, bytes(43)),
        "tensor 'b' ends at byte 140, but the file at 139: it is",
        True,
    ),
    Case("no-data", file([], TWO), "tensor 'a' ends at byte", True),
    Case(
        "header-not-padded",
        file([], [tensor("t", [0], 0, 0)], alignment=1),
        "tensor 't' ends at byte 64, but",
    ),
]

CASES = FRAMING + KEYS + ARRAYS + ALIGNMENT + NAMES + SHAPES + TYPES + OFFSETS

# Headers that llama.cpp reads and we refuse: its own loader aborts on them, or cannot load what they describe.
STRICTER = {
    "key-of-65536-bytes",
    "alignment-1",
    "alignment-8",
    "name-with-a-zero-byte",
    "zero-then-product",
    "2^62-bytes",
    "type-9",
    "type-15",
    "last-byte-missing",
    "no-data",
}
# ik_llama.cpp's types, which llama.cpp does not know.
LOOSER = {"ik-type-with-row-header", "ik-type-interleaved", "no-rows-of-row-headers"}
