"""A short run of `mutation`."""

from __future__ import annotations

from pathlib import Path

from tests.support.ggml_reader import GgmlReader

from . import mutation

FILES = 3000


def test_no_mutation_is_a_crash(tmp_path: Path) -> None:
    result = mutation.run(1, count=FILES, seconds=60, reader=None, path=tmp_path / "file.gguf")
    assert result.files == FILES
    assert 100 < result.read < FILES


def test_llama_cpp_reads_whatever_we_read(ggml_reader: GgmlReader, tmp_path: Path) -> None:
    result = mutation.run(2, count=FILES, seconds=60, reader=ggml_reader, path=tmp_path / "file.gguf")
    assert result.asked > 100
    assert result.accepted_alone == []
