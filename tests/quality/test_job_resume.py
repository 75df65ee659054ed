"""An interrupted profile resumes after its last batch."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from moe_surgery.quality.job import ProfileResult  # noqa: E402
from moe_surgery.selection.plan import Plan  # noqa: E402
from tests.quality.jobs import TINY, Recorder, interrupted, run  # noqa: E402
from tests.support.command import start_stopped, stop_with  # noqa: E402


def test_an_interrupted_run_resumes_after_its_last_batch(texts: Path, tmp_path: Path) -> None:
    paths = [texts / "words.jsonl", texts / "talk.jsonl"]
    undisturbed = run(tmp_path / "whole", *paths, batch_tokens=40)
    out = tmp_path / "s"
    # The first call tells what was kept; then a call for each of 4 layers of a batch.
    interrupted(out, paths, 1 + 4 * 2 + 1, batch_tokens=40)
    printed = Recorder()
    result = run(out, *paths, batch_tokens=40, progress=printed)
    assert out.read_bytes() == undisturbed.output.read_bytes()
    [(_, total, done)] = printed.stages
    assert 0 < result.resumed_tokens < sum(result.statistics.tokens.values())
    assert done[0] == result.resumed_tokens
    assert sum(done) == total == sum(result.statistics.tokens.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s", "whole"]


def test_what_a_run_left_is_really_used(texts: Path, tmp_path: Path) -> None:
    """A sum that was changed in the partial file shows in the result."""
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    out, paths = tmp_path / "s", [texts / "words.jsonl"]
    interrupted(out, paths, 1 + 4 + 1, batch_tokens=20)
    partial = tmp_path / ".s.partial"
    with safe_open(partial, "np") as opened:
        metadata = opened.metadata()
    arrays = load_file(partial)
    arrays["layer.1.words.gate"] = arrays["layer.1.words.gate"] + 1000
    save_file(arrays, partial, metadata)
    result = run(out, *paths, batch_tokens=20)
    plain = run(tmp_path / "plain", *paths, batch_tokens=20)
    gained = result.statistics.data["words"][1].gate - plain.statistics.data["words"][1].gate
    np.testing.assert_allclose(gained, 1000)


OTHERS: dict[str, dict[str, object]] = {
    "other batches": {"batch_tokens": 21},
    "another bound": {"max_tokens": 40},
    "another context": {"context": 30},
    "another dtype": {"dtype": torch.bfloat16},
    "another backend": {"backend": "reference-invariant"},
    "another plan": {"sequential": Plan("gpt_oss", 32, ((1, 2),) * 4)},
    "another top-k": {"sequential": Plan("gpt_oss", 32, ((0, 1),) * 4, 1)},
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_another_job_left_is_not_used(case: str, texts: Path, tmp_path: Path) -> None:
    options: dict[str, object] = {"batch_tokens": 20}
    if "top-k" in case or "plan" in case:
        options["sequential"] = Plan("gpt_oss", 32, ((0, 1),) * 4)
    out, paths = tmp_path / "s", [texts / "words.jsonl"]
    interrupted(out, paths, 1 + 4 + 1, **options)
    options |= OTHERS[case]
    result = run(out, *paths, **options)  # type: ignore[arg-type]
    assert result.resumed_tokens == 0
    assert out.read_bytes() == run(tmp_path / "fresh", *paths, **options).output.read_bytes()  # type: ignore[arg-type]


def test_what_a_run_left_of_other_texts_is_not_used(texts: Path, tmp_path: Path) -> None:
    out, changed = tmp_path / "s", tmp_path / "words.jsonl"
    changed.write_bytes((texts / "words.jsonl").read_bytes())
    interrupted(out, [changed], 1 + 4 + 1, batch_tokens=20)
    changed.write_bytes(changed.read_bytes().replace(b"patient", b"") + b'"one more"\n')
    assert run(out, changed, batch_tokens=20).resumed_tokens == 0


@pytest.mark.parametrize("left", [b"", b"nothing of ours", b"\x10" + b"\0" * 7 + b'{"a":1}         '])
def test_a_damaged_partial_file_is_not_used(left: bytes, texts: Path, tmp_path: Path) -> None:
    (tmp_path / ".s.partial").write_bytes(left)
    (tmp_path / "..s.partial.tmp").write_bytes(left)  # a run was killed while it saved
    (tmp_path / ".s.tmp").write_bytes(left)
    result = run(tmp_path / "s", texts / "words.jsonl")
    assert result.resumed_tokens == 0
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


@pytest.fixture(scope="module")
def many(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> ProfileResult:
    """Many batches; the texts lie beside the statistics."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "many.jsonl").write_text((texts / "words.jsonl").read_text() * 5)
    return run(folder / "s", folder / "many.jsonl", batch_tokens=20)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_process_leaves_what_the_next_run_finishes(
    sent: signal.Signals, many: ProfileResult, tmp_path: Path
) -> None:
    source = many.output.with_name("many.jsonl")
    out, partial = tmp_path / "s", tmp_path / ".s.partial"
    options = ("--texts", source, "--dtype", "f32", "--batch-tokens", "20", "-o", out)
    process = start_stopped(r"\.partial\.tmp$", 3, "profile", TINY, *options)
    assert partial.exists()
    stopped = stop_with(process, sent)
    assert stopped.code == (130 if sent == signal.SIGINT else -signal.SIGKILL)
    if sent == signal.SIGINT:
        assert "interrupted; the same command resumes after the last finished batch" in stopped.error
    assert not out.exists()
    result = run(out, source, batch_tokens=20)
    assert result.resumed_tokens > 0
    assert out.read_bytes() == many.output.read_bytes()
