"""A checkpoint whose files have no path, descriptor or mapping gives the same output byte for byte."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from moe_surgery import families
from moe_surgery.checkpoint.checkpoint import Checkpoint
from moe_surgery.checkpoint.resolve import resolve
from moe_surgery.families.identity import identity
from moe_surgery.pipeline.exporting import export_gguf
from moe_surgery.pipeline.planning import inspect
from moe_surgery.pipeline.pruning import prune
from moe_surgery.selection.plan import plan_keeping
from moe_surgery.surgery.verify import verify_checkpoint

from ..support.checkpoints import Shape, write_checkpoint
from ..support.command import contents
from ..support.sources import MemoryFolder

SHAPE = Shape(2, 8, 4, 512, 256, 8, 2, 32, 128)
KEPT = [0, 2, 3, 7]


@pytest.mark.parametrize("dtype", ["keep", "bf16", "mxfp4", "f32"])
def test_inspect_prune_and_verify_over_bytes_in_memory(tmp_path: Path, dtype: str) -> None:
    layout = "bf16" if dtype in ("mxfp4", "f32") else "mxfp4"
    source = write_checkpoint(tmp_path / "source", SHAPE, layout, shards=3)
    in_memory_source = MemoryFolder(source)
    options = {"store": dtype, "max_shard_size": 900_000}
    prune(source, tmp_path / "one", lambda m: plan_keeping(KEPT, m), **options)  # type: ignore[arg-type]
    expected = inspect(source).as_dict()
    with Checkpoint.open(source) as opened:
        expected_identity = identity(opened, families.identify_model(opened))
    for file in source.iterdir():
        file.unlink()

    assert inspect(in_memory_source).as_dict() == expected
    with Checkpoint.open(in_memory_source) as opened:
        assert identity(opened, families.identify_model(opened)) == expected_identity
    prune(in_memory_source, tmp_path / "two", lambda m: plan_keeping(KEPT, m), **options)  # type: ignore[arg-type]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert sum(name.endswith(".safetensors") for name in contents(tmp_path / "two")) > 1
    assert verify_checkpoint(tmp_path / "two", source=in_memory_source).ok
    assert sum(name.endswith(".safetensors") for name in in_memory_source.opened) == 3


@pytest.mark.parametrize(("layout", "dtype"), [("mxfp4", "keep"), ("bf16", "keep"), ("bf16", "mxfp4")])
def test_export_over_bytes_in_memory(tmp_path: Path, layout: str, dtype: str) -> None:
    source = write_checkpoint(tmp_path / "source", SHAPE, layout, shards=3)
    in_memory_source = MemoryFolder(source)
    export_gguf(source, tmp_path / "one.gguf", store=dtype, tokenizer=False, name="x")
    for file in source.iterdir():
        file.unlink()
    export_gguf(in_memory_source, tmp_path / "two.gguf", store=dtype, tokenizer=False, name="x")
    assert (tmp_path / "two.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(params=["next to the shards", "in the folder above"])
def with_tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the embedded checkpoint, or one in OpenAI's layout whose tokenizer is one folder up."""
    tiny = resolve("example:tiny")
    if request.param == "next to the shards":
        return shutil.copytree(tiny, tmp_path / "hub" / "tiny")
    shape = Shape(1, 4, 2, 64, 32, 4, 2, 8, 2048)
    source = write_checkpoint(tmp_path / "hub" / "original", shape, "original")
    for file in source.glob("*.jinja"):
        file.unlink()
    for name in ("config.json", *TOKENIZER_FILES):
        shutil.copy(tiny / name, source.parent)
    return source


def in_memory(source: Path) -> MemoryFolder:
    """The files of `source`, which is deleted with its parent folder."""
    above = MemoryFolder(source.parent)
    shutil.rmtree(source.parent)
    folder = above.folder(source.name)
    assert folder is not None
    return folder


def test_the_tokenizer_is_exported_from_bytes_in_memory(with_tokenizer: Path, tmp_path: Path) -> None:
    export_gguf(with_tokenizer, tmp_path / "one.gguf", name="x")
    export_gguf(in_memory(with_tokenizer), tmp_path / "two.gguf", name="x")
    assert (tmp_path / "two.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()


def test_files_beside_the_shards_are_copied_from_bytes_in_memory(
    with_tokenizer: Path, tmp_path: Path
) -> None:
    prune(with_tokenizer, tmp_path / "one", lambda m: plan_keeping([0, 2, 3], m))
    prune(in_memory(with_tokenizer), tmp_path / "two", lambda m: plan_keeping([0, 2, 3], m))
    assert set(TOKENIZER_FILES) < set(contents(tmp_path / "one"))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_text_over_bytes_in_memory(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    pytest.importorskip("jinja2")
    from moe_surgery.runtime.text import Text

    source = shutil.copytree(resolve("example:tiny"), tmp_path / "tiny")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools: {{ tools | length }}")
    folder = MemoryFolder(source)
    shutil.rmtree(source)
    text, expected = Text(folder), Text("example:tiny")
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    assert text.chat(messages) == expected.chat(messages)
    assert text.chat(messages, tools=[{}, {}]) == "tools: 2"
    assert text.encode("What is 2 + 2?") == expected.encode("What is 2 + 2?")
    assert text.stop_tokens == expected.stop_tokens
