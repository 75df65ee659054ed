"""Files of the gguf package are read as the package reads them."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_surgery.checkpoint.gguf.block_types import BY_NAME
from moe_surgery.checkpoint.gguf.header import read_gguf_header, read_value
from moe_surgery.checkpoint.local_file import LocalFile
from tests.export.reading import gguf, read

KIND = gguf.GGUFValueType
RANGES = {
    KIND.UINT8: (0, 2**8 - 1),
    KIND.INT8: (-(2**7), 2**7 - 1),
    KIND.UINT16: (0, 2**16 - 1),
    KIND.INT16: (-(2**15), 2**15 - 1),
    KIND.UINT32: (0, 2**32 - 1),
    KIND.INT32: (-(2**31), 2**31 - 1),
    KIND.UINT64: (0, 2**64 - 1),
    KIND.INT64: (-(2**63), 2**63 - 1),
}
VALUES: dict[Any, st.SearchStrategy[Any]] = {
    **{kind: st.integers(*bounds) for kind, bounds in RANGES.items()},
    KIND.FLOAT32: st.floats(width=32, allow_nan=False),
    KIND.FLOAT64: st.floats(allow_nan=False),
    KIND.BOOL: st.booleans(),
    KIND.STRING: st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
}
KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda key: not key.startswith(("GGUF.", "general."))
)
TYPES = [
    "F32",
    "F16",
    "BF16",
    "F64",
    "I8",
    "I32",
    "Q4_0",
    "Q8_0",
    "Q4_K",
    "Q6_K",
    "IQ2_XXS",
    "IQ4_NL",
    "MXFP4",
    "NVFP4",
]
Entry = tuple[Any, Any]


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    """(type, value), where a list is an array of that type."""
    kind = draw(st.sampled_from(sorted(VALUES)))
    return kind, draw(VALUES[kind] | st.lists(VALUES[kind], min_size=1, max_size=5))


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, tuple[int, ...]]:
    """(type, shape), slowest dimension first."""
    kind = draw(st.sampled_from(TYPES))
    rows = draw(st.lists(st.integers(1, 3), max_size=3))
    return kind, (*rows, draw(st.integers(1, 3)) * BY_NAME[kind].block_values)


def write(
    path: Path,
    metadata: dict[str, Entry],
    content: dict[str, tuple[str, tuple[int, ...]]],
    alignment: int,
    version: int,
) -> None:
    writer = gguf.GGUFWriter(path, "gpt-oss")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    for key, (kind, value) in metadata.items():
        if isinstance(value, list):
            writer.add_key_value(key, value, KIND.ARRAY, sub_type=kind)
        else:
            writer.add_key_value(key, value, kind)
    for number, (name, (kind, shape)) in enumerate(content.items()):
        columns = shape[-1] // BY_NAME[kind].block_values * BY_NAME[kind].block_bytes
        raw = np.random.default_rng(number).integers(0, 256, (*shape[:-1], columns), np.uint8)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.seek(4)
        file.write(struct.pack("<I", version))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf") / "file.gguf"


@given(
    st.dictionaries(KEYS, entries(), max_size=6),
    st.dictionaries(st.text("abc.xé", min_size=1, max_size=9), tensors(), max_size=5),
    st.sampled_from([16, 32, 64, 512, 4096]),
    st.sampled_from([2, 3]),
)
def test_what_the_gguf_package_wrote(
    path: Path,
    metadata: dict[str, Entry],
    content: dict[str, tuple[str, tuple[int, ...]]],
    alignment: int,
    version: int,
) -> None:
    write(path, metadata, content, alignment, version)
    expected, raw = read(path), path.read_bytes()
    with LocalFile(path) as source:
        got = read_gguf_header(source)
        values = {key: read_value(source, entry) for key, entry in got.metadata.items()}
    assert (got.version, got.alignment) == (version, alignment)
    keys = {k: v for k, v in expected.metadata.items() if not k.startswith("GGUF.")}
    assert values == keys
    assert list(values) == list(keys)  # in the order of the file
    assert {type(v) for v in values.values()} <= {int, float, bool, str, list}
    found = {
        info.name: (info.type.name, info.shape, info.offset, raw[info.offset : info.offset + info.nbytes])
        for info in got.tensors.values()
    }
    assert found == expected.tensors
    assert list(found) == list(expected.tensors)
    # Entries as raw bytes are the file between its first 24 bytes and the tensor table.
    packed = b"".join(raw[entry.offset : entry.end] for entry in got.metadata.values())
    assert raw[24 : 24 + len(packed)] == packed
    for entry in got.metadata.values():
        assert raw[entry.offset : entry.value].endswith(
            struct.pack("<IIQ", entry.type, entry.item_type, entry.count)
            if entry.type == KIND.ARRAY
            else struct.pack("<I", entry.type)
        )


def test_not_a_number_and_what_is_no_utf8_are_kept(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "gpt-oss")
    writer.add_float32("nan", math.nan)
    writer.add_array("tokens", [b"\xff\xfe", b"caf\xc3\xa9"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with LocalFile(path) as source:
        got = read_gguf_header(source)
        assert math.isnan(read_value(source, got.metadata["nan"]))  # type: ignore[arg-type]
        tokens = read_value(source, got.metadata["tokens"])
    assert tokens == ["\udcff\udcfe", "café"]
