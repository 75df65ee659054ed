"""The container, read back by the gguf package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_surgery.checkpoint.gguf.block_types import BLOCK_TYPES, BY_NAME
from moe_surgery.checkpoint.gguf.writer import ALIGNMENT, Metadata, TensorEntry, header, padding
from tests.export.reading import gguf, read

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf") / "file.gguf"


def test_types_are_those_of_the_gguf_package() -> None:
    known = [t for t in gguf.GGMLQuantizationType if t.value in BLOCK_TYPES]
    assert len(known) > 30
    for kind in known:
        ours = BLOCK_TYPES[kind.value]
        assert (ours.name, (ours.block_values, ours.block_bytes)) == (kind.name, gguf.GGML_QUANT_SIZES[kind])


def test_interleaved_types_have_the_sizes_of_their_base_types() -> None:
    interleaved = [t for t in BLOCK_TYPES.values() if t.row_group > 1]
    assert {t.name.rpartition("_R")[2] for t in interleaved} == {str(g) for g in (4, 8, 16)}
    own_layout = {"IQ1_S_R4", "IQ1_M_R4", "Q8_K_R8", "Q8_K_R16", "Q8_KV_R8"}
    for kind in interleaved:
        base, _, group = kind.name.rpartition("_R")
        assert kind.row_group == int(group)
        if kind.name not in own_layout:
            expected = BY_NAME[base]
            sizes = (expected.block_values, expected.block_bytes, expected.row_header)
            assert (kind.block_values, kind.block_bytes, kind.row_header) == sizes


@given(
    st.lists(TEXT.filter(bool), min_size=1, max_size=5),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5),
    st.integers(0, 2**32 - 1),
    st.floats(width=32, allow_nan=False),
    st.booleans(),
    TEXT,
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), max_size=5),
)
def test_metadata_and_table_come_back(
    file: Path,
    texts: list[str],
    numbers: list[int],
    number: int,
    real: float,
    flag: bool,
    text: str,
    shapes: list[tuple[int, int]],
) -> None:
    metadata = Metadata()
    metadata.text("general.architecture", "gpt-oss")
    metadata.texts("a.texts", [t.encode() for t in texts])
    metadata.i32s("a.numbers", numbers)
    metadata.u32("a.number", number)
    metadata.f32("a.real", real)
    metadata.flag("a.flag", flag)
    metadata.text("a.text", text)
    entries = [TensorEntry(f"t{i}", BY_NAME["F32"], s, 4 * s[0] * s[1]) for i, s in enumerate(shapes)]
    data = [np.full(s, i + 0.5, np.float32) for i, s in enumerate(shapes)]
    raw = header(metadata, entries)
    assert len(raw) % ALIGNMENT == 0
    body = b"".join(d.tobytes() + bytes(padding(d.nbytes)) for d in data)
    file.write_bytes(raw + (body or bytes(ALIGNMENT)))
    got = read(file)
    assert {k: v for k, v in got.metadata.items() if not k.startswith("GGUF.")} == {
        "general.architecture": "gpt-oss",
        "a.texts": texts,
        "a.numbers": numbers,
        "a.number": number,
        "a.real": real,
        "a.flag": flag,
        "a.text": text,
    }
    assert got.metadata["GGUF.version"] == 3
    for entry, values in zip(entries, data, strict=True):
        kind, shape, offset, content = got.tensors[entry.name]
        assert (kind, shape, offset % ALIGNMENT) == ("F32", entry.shape, 0)
        assert content == values.tobytes()
