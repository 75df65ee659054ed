"""The corpus of broken and odd headers: one row a file, our verdict and the library's.

FRAMING breaks the length prefix, the other lists the JSON, the offsets, and shape and dtype.
"""

from __future__ import annotations

from .oracle import (
    ACCEPT,
    BAD_INFO,
    BAD_JSON,
    BAD_LENGTH,
    BAD_OFFSET,
    BAD_UTF8,
    MISALIGNED,
    NOT_COVERED,
    OVERFLOW,
    TOO_LARGE,
    TOO_SMALL,
    Case,
    entry,
    obj,
    st,
)

OK1 = b'{"test":{"dtype":"I32","shape":[2,2],"data_offsets":[0,16]}}'
DATA16 = bytes(range(16))
VALID = st(OK1, DATA16)
BYTE = entry("U8", [1], 0, 1)
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 13\n"
BIG = 2**61 - 1


def one(fields: str) -> bytes:
    """A header of the tensor "t" with its entry as given."""
    return obj(("t", fields))


def fields(dtype: str = '"U8"', shape: str = "[1]", offsets: str = "[0,1]") -> str:
    """An entry with each value as raw JSON."""
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}'


FRAMING = [
    Case("empty-file", b"", "0 bytes are too few", TOO_SMALL),
    *(Case(f"{n}-bytes", b"\0" * n, f"{n} bytes are too few", TOO_SMALL) for n in range(1, 8)),
    Case("length-without-header", b"<" + b"\0" * 7, "length 60 does not fit", BAD_LENGTH),
    Case("high-bits-set", b"<\0\0\0\0\xff\xff\xff" + OK1 + DATA16, "over the limit", TOO_LARGE),
    Case("length-2^64-1", st(OK1, DATA16, 2**64 - 1), "18446744073709551615 is over", TOO_LARGE),
    Case("length-2^63", st(OK1, DATA16, 2**63), "9223372036854775808 is over", TOO_LARGE),
    Case("length-overwritten", st(OK1, DATA16, 1000), "1000 does not fit a file of 84", BAD_LENGTH),
    Case("length-0", st(b""), "header length is 0", BAD_JSON),
    Case("header-cut-in-half", st(OK1[:30], b"", 60), "60 does not fit a file of 38", BAD_LENGTH),
    Case("header-cut-by-1", st(OK1[:59], b"", 60), "60 does not fit a file of 67", BAD_LENGTH),
    Case("length-1-too-small", st(OK1, DATA16, 59), "not valid JSON at character 59", BAD_JSON),
    Case("length-swallows-data", st(OK1, b"\0" * 16, 64), "not valid JSON at character 60", BAD_JSON),
    Case("git-lfs-pointer", LFS_POINTER, "Git LFS pointer", TOO_LARGE),
    Case("bytes-appended", VALID + b"extra_bogus_data_for_polyglot_file", "34 bytes after", NOT_COVERED),
    Case("zip-appended", VALID + b"PK\x05\x06" + b"\0" * 18, "22 bytes after the last", NOT_COVERED),
    Case("two-bytes-missing", VALID[:-2], "truncated: .*byte 16 .*has 14", NOT_COVERED),
    Case("one-zero-appended", VALID + b"\0", "1 bytes after the last tensor", NOT_COVERED),
    Case("eight-zeros-appended", VALID + b"\0" * 8, "8 bytes after the last tensor", NOT_COVERED),
    Case("no-tensors", st(b"{}"), ACCEPT, ACCEPT),
    Case("no-tensors-one-byte", st(b"{}", b"\0"), "1 bytes after the last tensor", NOT_COVERED),
    Case("length-is-a-pickle-magic", st(OK1.ljust(0x0280), DATA16), ACCEPT, ACCEPT),
]

JSON = [
    Case("not-utf8", st(b"\xff"), "not UTF-8 at byte 0", BAD_UTF8),
    Case("truncated-utf8", st(b'{"\xc2'), "not UTF-8 at byte 2", BAD_UTF8),
    Case("overlong-utf8", st(b'{"\xe0\x80\x80":' + BYTE.encode() + b"}", b"\0"), "not UTF-8", BAD_UTF8),
    Case("surrogate-bytes", st(b'{"\xed\xa0\x80":' + BYTE.encode() + b"}", b"\0"), "not UTF-8", BAD_UTF8),
    Case("byte-order-mark", st(b"\xef\xbb\xbf" + OK1, DATA16), "byte order mark", BAD_JSON),
    Case("unclosed-object", st(b"{"), "not valid JSON at character 1", BAD_JSON),
    Case("root-array", st(b"[]"), "must be a JSON object, got an array of 0", BAD_JSON),
    Case("root-null", st(b"null"), "must be a JSON object, got null", BAD_JSON),
    Case("root-number", st(b"1"), "must be a JSON object, got 1", BAD_JSON),
    Case("root-string", st(b'""'), "must be a JSON object, got the string ''", BAD_JSON),
    Case("trailing-whitespace", st(b"{}\r \t\n"), ACCEPT, ACCEPT),
    Case("leading-whitespace", st(b"\t\n{}\r "), ACCEPT, ACCEPT),
    Case("padded-with-nul", st(OK1 + b"\0" * 4, DATA16), "not valid JSON at character 60", BAD_JSON),
    Case("two-objects", st(b"{}{}"), "not valid JSON at character 2", BAD_JSON),
    Case("text-after-object", st(b"{}x"), "not valid JSON at character 2", BAD_JSON),
    Case(
        "duplicate-name-same-range",
        st(obj(("w", entry("U8", [4], 0, 4)), ("w", entry("F32", [1], 0, 4))), b"\0\0\x80\x3f"),
        "duplicate key 'w'",
        ACCEPT,
    ),
    Case(
        "duplicate-name-other-range",
        st(obj(("w", entry("U8", [4], 0, 4)), ("w", entry("U8", [4], 4, 8))), b"\0" * 8),
        "duplicate key 'w'",
        BAD_OFFSET,
    ),
    Case("duplicate-through-escape", st(obj(("w", BYTE), (r"\u0077", BYTE)), b"\0"), "key 'w'", ACCEPT),
    Case("metadata-twice", st(b'{"__metadata__":{},"__metadata__":{}}'), "key '__metadata__'", BAD_JSON),
    Case("metadata-through-escape", st(rb'{"\u005f_metadata__":{"a":"b"}}'), ACCEPT, ACCEPT),
    Case(
        "dtype-twice",
        st(one('{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}'), b"\0"),
        "duplicate key 'dtype'",
        BAD_JSON,
    ),
    Case("metadata-key-twice", st(b'{"__metadata__":{"k":"1","k":"2"}}'), "duplicate key 'k'", ACCEPT),
    Case("metadata-number", st(b'{"__metadata__":1}'), "__metadata__ must be an object", BAD_JSON),
    Case("metadata-value-1", st(b'{"__metadata__":{"k":1}}'), "'k' must be a string, got 1", BAD_JSON),
    Case("metadata-value-null", st(b'{"__metadata__":{"k":null}}'), "string, got null", BAD_JSON),
    Case("metadata-value-object", st(b'{"__metadata__":{"k":{}}}'), "string, got an object", BAD_JSON),
    Case("metadata-null", st(b'{"__metadata__":null}'), "must be an object, got null", ACCEPT),
    Case("metadata-like-a-tensor", st(obj(("__metadata__", BYTE)), b"\0"), "must be a string", BAD_JSON),
    Case("unknown-field", st(one(BYTE[:-1] + ',"x":1}'), b"\0"), "tensor 't': unknown field 'x'", ACCEPT),
    Case("entry-as-array", st(one('["U8",[1],[0,1]]'), b"\0"), "entry must be an object", ACCEPT),
    Case("entry-null", st(one("null")), "entry must be an object, got null", BAD_JSON),
    Case("no-dtype", st(one('{"shape":[1],"data_offsets":[0,1]}'), b"\0"), "dtype is missing", BAD_JSON),
    Case("no-shape", st(one('{"dtype":"U8","data_offsets":[0,1]}'), b"\0"), "shape is missing", BAD_JSON),
    Case("no-offsets", st(one('{"dtype":"U8","shape":[1]}'), b"\0"), "data_offsets is missing", BAD_JSON),
    *(
        Case(f"offset-{number[:12]}", st(one(fields(offsets=f"[0,{number}]")), b"\0" * 16), why, BAD_JSON)
        for number, why in [
            ("16.0", "16.0 is not a plain integer"),
            ("1.6e1", "1.6e1 is not a plain integer"),
            ("-0", "-0 is not a 64-bit integer"),
            ("-1", "non-negative integers, got -1"),
            ('"16"', "non-negative integers, got the string '16'"),
            ("true", "non-negative integers, got true"),
            ("null", "non-negative integers, got null"),
            ("016", "not valid JSON"),
            ("+16", "not valid JSON"),
            ("0x10", "not valid JSON"),
            ("NaN", "NaN is not JSON"),
            ("Infinity", "Infinity is not JSON"),
            ("-Infinity", "-Infinity is not JSON"),
            ("18446744073709551616", "18446744073709551616 is not a 64-bit integer"),
            ("9" * 4000, "9999.* is not a 64-bit integer"),
        ]
    ),
    Case("shape-true", st(one(fields(shape="[true]")), b"\0"), "shape must hold .* got true", BAD_JSON),
    Case("shape-float", st(one(fields(shape="[1.0]")), b"\0"), "1.0 is not a plain integer", BAD_JSON),
    Case("3000-objects-deep", st(b'{"a":' * 3000), "nested deeper than 64", BAD_JSON),
    Case("1e6-arrays-deep", st(b"[" * 10**6), "nested deeper than 64", BAD_JSON),
    Case("deep-under-a-name", st(one("[" * 200 + "]" * 200)), "nested deeper than 64", BAD_JSON),
    Case("lone-surrogate", st(obj((r"\ud800", BYTE)), b"\0"), "lone surrogate", BAD_JSON),
    Case("lone-low-surrogate", st(obj((r"a\uDFFF", BYTE)), b"\0"), "lone surrogate", BAD_JSON),
    Case("surrogate-in-metadata", st(b'{"__metadata__":{"k":"\\ud800"}}'), "lone surrogate", BAD_JSON),
    Case("surrogate-pair", st(obj((r"\ud83d\ude00", BYTE)), b"\0"), ACCEPT, ACCEPT),
    Case("raw-control-character", st(obj(("\x01", BYTE)), b"\0"), "Invalid control character", BAD_JSON),
    Case("empty-name", st(obj(("", BYTE)), b"\0"), ACCEPT, ACCEPT),
    Case("nul-in-name", st(obj((r"\u0000", BYTE)), b"\0"), ACCEPT, ACCEPT),
    Case("path-as-name", st(obj(("../../../tmp/evil", BYTE)), b"\0"), ACCEPT, ACCEPT),
    Case("terminal-escape", st(obj((r"\u001b[2J", BYTE)), b"\0"), ACCEPT, ACCEPT),
    Case("markup", st(obj(("[link=https://example.org]x[/link]", BYTE)), b"\0"), ACCEPT, ACCEPT),
    Case("name-of-4096-bytes", st(obj(("é" * 2048, BYTE)), b"\0"), ACCEPT, ACCEPT),
    Case("name-of-4097-bytes", st(obj(("é" * 2048 + "a", BYTE)), b"\0"), "longer than 4096", ACCEPT),
    Case("name-of-10-MB", st(obj(("n" * 10**7, BYTE)), b"\0"), r"nnn\.\.\.nnn.*longer than", ACCEPT),
    Case("truncated-unicode-escape", st(rb'{"\u12'), "not valid JSON", BAD_JSON),
    Case("unknown-escape", st(rb'{"\x":1}'), "not valid JSON", BAD_JSON),
    Case("unterminated-string", st(b'{"a'), "not valid JSON", BAD_JSON),
    Case("ends-in-backslash", st(b'{"a\\'), "not valid JSON", BAD_JSON),
]

OFFSETS = [
    Case(
        "ten-tensors-on-one-range",
        st(obj(*((f"t{i}", entry("F32", [2, 2], 0, 16)) for i in range(10))), DATA16),
        "'t1': data begin at 0, expected 16: it overlaps tensor 't0'",
        BAD_OFFSET,
    ),
    Case(
        "overlap",
        st(obj(("a", entry("U8", [8], 0, 8)), ("b", entry("U8", [4], 4, 8))), b"\0" * 8),
        "'b': data begin at 4, expected 8: it overlaps tensor 'a'",
        BAD_OFFSET,
    ),
    Case(
        "hole",
        st(obj(("a", entry("U8", [4], 0, 4)), ("b", entry("U8", [4], 8, 12))), b"\0" * 12),
        "'b': data begin at 8, expected 4: it leaves a gap after tensor 'a'",
        BAD_OFFSET,
    ),
    Case("first-begins-at-1", st(one(entry("U8", [4], 1, 5)), b"\0" * 5), "after the header", BAD_OFFSET),
    Case("reversed-by-1", st(one(entry("U8", [1], 4, 3)), b"\0" * 4), "backwards, from 4 to 3", BAD_OFFSET),
    Case("reversed", st(one(entry("U8", [1], 100, 0)), b"\0"), "backwards, from 100 to 0", BAD_OFFSET),
    Case("negative-begin", st(one(entry("U8", [4], -1, 3)), b"\0" * 3), "got -1", BAD_JSON),
    Case("negative-end", st(one(entry("U8", [4], 0, -4)), b"\0" * 4), "got -4", BAD_JSON),
    *(
        Case(f"{n}-offsets", st(one(fields(offsets=text)), b"\0"), f"two integers, got {n}", BAD_JSON)
        for n, text in [(0, "[]"), (1, "[0]"), (3, "[0,1,1]")]
    ),
    Case("offsets-not-an-array", st(one(fields(offsets='"01"')), b"\0"), "must be an array", BAD_JSON),
    Case(
        "data-cut-to-one-byte",
        st(one(entry("F32", [1024, 1024], 0, 4194304)), b"\0"),
        "truncated: tensor 't' ends at byte 4194304 of the data, but the file has 1",
        NOT_COVERED,
    ),
    Case("range-too-small", st(one(entry("I32", [2, 2], 0, 4)), b"\0" * 4), "16 bytes, .*give 4", BAD_INFO),
    Case("range-too-large", st(one(entry("F32", [32, 8], 0, 65536)), b"\0" * 65536), "1024 byt", BAD_INFO),
    Case(
        "any-order-in-the-json",
        st(obj(("b", entry("U8", [2], 4, 6)), ("a", entry("U8", [4], 0, 4))), b"abcdef"),
        ACCEPT,
        ACCEPT,
    ),
    *(
        Case(
            f"empty-tensor-{'-'.join(names)}",
            st(obj(*((n, entry("U8", [size], at, at + size)) for n, size, at in places)), b"abcd"),
            ACCEPT,
            ACCEPT,
        )
        for places in [
            [("z", 0, 0), ("a", 4, 0)],
            [("a", 4, 0), ("z", 0, 0)],
            [("a", 2, 0), ("z", 0, 2), ("b", 2, 2)],
            [("a", 4, 0), ("last", 0, 4)],
            [("last", 0, 4), ("z", 0, 0), ("a", 4, 0), ("y", 0, 0)],
        ]
        for names in [[name for name, _, _ in places]]
    ),
    Case(
        "empty-tensor-inside-another",
        st(obj(("a", entry("U8", [8], 0, 8)), ("z", entry("U8", [0], 4, 4))), b"\0" * 8),
        "'z': data begin at 4, expected 8",
        BAD_OFFSET,
    ),
    Case("empty-tensor-beyond-the-data", st(one(entry("U8", [0], 100, 100))), "begin at 100", BAD_OFFSET),
    Case(
        "ends-near-2^64",
        st(obj(*((f"t{i}", entry("U8", [BIG], i * BIG, (i + 1) * BIG)) for i in range(8)))),
        f"truncated: tensor 't7' ends at byte {8 * BIG} of the data, but the file has 0",
        NOT_COVERED,
    ),
    Case("range-at-2^64", st(one(entry("U8", [15], 2**64 - 16, 2**64 - 1))), "begin at 184467", BAD_OFFSET),
    Case("begin-past-2^53", st(one(entry("U8", [1], 2**53 + 1, 2**53 + 2))), "9007199254740993", BAD_OFFSET),
    Case(
        "end-past-2^63",
        st(one(entry("U8", [1], 0, 2**63 + 1)), b"\0"),
        "give 9223372036854775809",
        BAD_INFO,
    ),
]

OVERFLOWS = "overflows 64-bit sizes"
SHAPES = [
    Case("product-wraps", st(one(entry("I32", [2, 2**64 - 2], 0, 16)), DATA16), "outside 0", OVERFLOW),
    Case("bits-overflow", st(one(entry("I32", [2, 2**63 - 1], 0, 16)), DATA16), OVERFLOWS, OVERFLOW),
    Case(
        "product-is-4-modulo-2^64",
        st(one(entry("F32", [4194305, 4194305, 211106198978564], 0, 16)), DATA16),
        OVERFLOWS,
        OVERFLOW,
    ),
    Case("overflow-then-zero", st(one(entry("U8", [2**63, 2, 0], 0, 0))), "outside 0", OVERFLOW),
    Case("zero-then-overflow", st(one(entry("U8", [0, 2**63, 2], 0, 0))), "outside 0", ACCEPT),
    Case("zero-then-product", st(one(entry("U8", [0, 2**62, 8], 0, 0))), OVERFLOWS, ACCEPT),
    Case("scalar", st(one(entry("I32", [], 0, 4)), b"\0" * 4), ACCEPT, ACCEPT),
    Case("rank-16", st(one(entry("U8", [1] * 16, 0, 1)), b"\0"), ACCEPT, ACCEPT),
    Case("rank-17", st(one(entry("U8", [1] * 17, 0, 1)), b"\0"), "17 dimensions are over", ACCEPT),
    Case("rank-1e6", st(one(entry("U8", [1] * 10**6, 0, 1)), b"\0"), "1000000 dimensions are", ACCEPT),
    Case("half-a-byte", st(one(entry("F4", [1], 0, 1)), b"\0"), "4 bits of F4 do not fill", MISALIGNED),
    Case("byte-and-a-half", st(one(entry("F4", [1, 3], 0, 2)), b"\0\0"), "12 bits of F4", MISALIGNED),
    Case("two-f4", st(one(entry("F4", [2], 0, 1)), b"\0"), ACCEPT, ACCEPT),
    Case("four-f6", st(one(entry("F6_E2M3", [4], 0, 3)), b"\0\0\0"), ACCEPT, ACCEPT),
    *(
        Case(f"dtype-{text}", st(one(fields(dtype=text, offsets="[5,3]")), b"\0"), why, BAD_JSON)
        for text, why in [
            ('"I666"', "backwards"),
            ("4", "dtype must be a string, got 4"),
            ("null", "got null"),
        ]
    ),
    *(
        Case(
            f"dtype-{text}",
            st(one(fields(dtype=f'"{text}"')), b"\0"),
            f"unknown dtype '{text}'",
            BAD_JSON,
        )
        for text in ["I666", "f32", "", "F32 "]
    ),
    Case("dtype-array", st(one(fields(dtype="[]")), b"\0"), "dtype must be a string, got an", BAD_JSON),
    Case("other-dtype-of-one-width", st(one(entry("I32", [4], 0, 16)), DATA16), ACCEPT, ACCEPT),
    Case("dimension-past-2^31", st(one(entry("U8", [2**31 + 8, 0], 0, 0))), ACCEPT, ACCEPT),
    Case("nan-payload", st(one(entry("F32", [2], 0, 8)), b"\xff" * 4 + b"\1\0\x80\x7f"), ACCEPT, ACCEPT),
    Case("scale-255", st(one(entry("F8_E8M0", [1], 0, 1)), b"\xff"), ACCEPT, ACCEPT),
    Case(
        "S-shape-not-an-array", st(one(fields(shape="1")), b"\0"), "shape must be an array, got 1", BAD_JSON
    ),
]

CASES = FRAMING + JSON + OFFSETS + SHAPES

# Files that the library reads and we refuse. Nothing may be added without a reason in header.py.
STRICTER_THAN_REFERENCE = {
    "duplicate-name-same-range",
    "duplicate-through-escape",
    "metadata-key-twice",
    "metadata-null",
    "unknown-field",
    "entry-as-array",
    "name-of-4097-bytes",
    "name-of-10-MB",
    "zero-then-overflow",
    "zero-then-product",
    "rank-17",
    "rank-1e6",
}
