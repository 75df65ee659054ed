"""llama.cpp's reader, where it is installed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.ggml_reader import GgmlReader, ggml_library


@pytest.fixture(scope="session")
def ggml_reader() -> Iterator[GgmlReader]:
    library = ggml_library()
    if library is None:
        pytest.skip("llama-cpp-python is not installed: pip install llama-cpp-python builds it")
    with GgmlReader(library) as reader:
        yield reader
