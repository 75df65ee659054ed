"""moe-surgery export: what it prints, and how it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from moe_surgery.checkpoint.resolve import resolve
from tests.support.checkpoints import Shape, write_checkpoint
from tests.support.command import call

Capture = pytest.CaptureFixture[str]
TINY_BYTES = 7_760_896


def test_the_embedded_model(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "tiny.gguf"
    done = call(capsys, "export", "example:tiny", out, "--quiet")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(
        f"{out}: 32 experts, top-4, 11.0M parameters, 7.76 MB in 79 tensors (MXFP4 experts, "
        "BF16 attention and embeddings), "
    )
    assert out.stat().st_size == TINY_BYTES


def test_json(tmp_path: Path, capsys: Capture) -> None:
    parameters = call(capsys, "inspect", "example:tiny", "--json").json()["parameters"]
    result = call(capsys, "export", "example:tiny", tmp_path / "tiny.gguf", "--json", "-q").json()
    assert result.pop("seconds") > 0
    assert result.pop("bytes_by_type").keys() == {"BF16", "F32", "MXFP4"}
    assert result == {
        "output": str(tmp_path / "tiny.gguf"),
        "name": "tiny-gpt-oss",
        "experts": 32,
        "top_k": 4,
        "parameters": parameters,
        "expert_storage": "mxfp4",
        "dense_storage": "bf16",
        "tensors": 79,
        "bytes_read": result["bytes_read"],
        "bytes_written": TINY_BYTES,
        "bytes_to_fetch": 0,
        "pre_tokenizer": "gpt-2",
        "tokens": 2048,
        "chat_template": True,
        "written": True,
        "notes": [],
        "conversion": None,
    }


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: Capture) -> None:
    done = call(capsys, "export", "example:tiny", tmp_path / "tiny.gguf", "--dry-run")
    assert done.code == 0
    assert done.out.startswith("would write ")
    assert "MXFP4 5.22 MB" in done.out
    assert list(tmp_path.iterdir()) == []


def test_with_a_plan_and_a_name(tmp_path: Path, capsys: Capture) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "tiny-3.gguf"
    chosen = ("--keep", "0,9,31", "example:tiny")
    assert call(capsys, "plan", *chosen, "-o", plan).code == 0
    arguments = ("export", "example:tiny", out, "--plan", plan, "--name", "three")
    result = call(capsys, *arguments, "--json").json()
    assert (result["experts"], result["top_k"], result["name"]) == (3, 3, "three")


def test_bf16_to_mxfp4_reports_what_it_lost(tmp_path: Path, capsys: Capture) -> None:
    source = write_checkpoint(tmp_path / "in", layout="bf16")
    arguments = ("export", source, tmp_path / "out.gguf", "--store", "mxfp4", "--no-tokenizer")
    done = call(capsys, *arguments)
    assert done.code == 0
    assert "MXFP4: 0 of 1,536 blocks inexact, relative error 0" in done.err
    result = call(capsys, *arguments, "--overwrite", "--json").json()
    assert (result["conversion"]["blocks"], result["conversion"]["relative_error"]) == (1536, 0)


def test_dense_matrices_as_q8_0(tmp_path: Path, capsys: Capture) -> None:
    arguments = ("export", "example:tiny", tmp_path / "tiny.gguf", "--dense", "q8_0")
    done = call(capsys, *arguments)
    assert (done.code, done.err) == (0, "")
    assert "(MXFP4 experts, Q8_0 attention and embeddings), " in done.out
    result = call(capsys, *arguments, "--overwrite", "--json").json()
    assert result["bytes_by_type"].keys() == {"Q8_0", "F32", "MXFP4"}
    assert result["dense_storage"] == "q8_0"
    assert result["bytes_written"] == (tmp_path / "tiny.gguf").stat().st_size < TINY_BYTES
    narrow = write_checkpoint(tmp_path / "narrow", Shape(hidden=48, intermediate=40), "bf16")
    done = call(capsys, "export", narrow, tmp_path / "out.gguf", "--dense", "q8_0", "--no-tokenizer")
    assert done.code == 2
    assert done.error == (
        "moe-surgery: --dense q8_0: tensor 'model.embed_tokens.weight' has 48 columns, not a multiple of 32"
    )
    assert not (tmp_path / "out.gguf").exists()


def test_a_missing_tokenizer_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    source = write_checkpoint(tmp_path / "in")
    done = call(capsys, "export", source, tmp_path / "out.gguf")
    assert done.code == 5
    assert done.error == (
        f"moe-surgery: {source / 'tokenizer.json'}: not found; copy the model's tokenizer.json there, "
        "or pass --no-tokenizer to export without a tokenizer"
    )
    assert not (tmp_path / "out.gguf").exists()


def test_a_missing_template_is_a_note(tmp_path: Path, capsys: Capture) -> None:
    source = tmp_path / "in"
    shutil.copytree(resolve("example:tiny"), source)
    (source / "chat_template.jinja").unlink()
    done = call(capsys, "export", source, tmp_path / "out.gguf")
    assert done.code == 0
    assert "note: the checkpoint has no chat template" in done.err


def test_another_family_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    source = write_checkpoint(tmp_path / "in", edit_config=lambda c: c.update(model_type="dbrx"))
    done = call(capsys, "export", source, tmp_path / "out.gguf")
    assert done.code == 3
    assert "is a dbrx checkpoint (GptOssForCausalLM); supported model_type: gpt_oss" in done.error


def test_an_existing_file_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("keep me")
    done = call(capsys, "export", "example:tiny", out)
    assert done.code == 5
    assert done.error == (
        f"moe-surgery: {out}: exists; choose another name, or pass --overwrite to replace it"
    )
    assert out.read_text() == "keep me"
