"""`moe-surgery generate`: prompts in by every way, text or JSON out, one line for what cannot be."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from moe_surgery import inspect, load_model, load_plan, plan_random, prune  # noqa: E402
from moe_surgery.kernels import select_backend  # noqa: E402
from moe_surgery.runtime.generate import generate  # noqa: E402
from moe_surgery.runtime.text import Text  # noqa: E402
from tests.support.checkpoints import Shape, write_checkpoint  # noqa: E402
from tests.support.command import Ended, call, run  # noqa: E402

Capture = pytest.CaptureFixture[str]
TINY = "example:tiny"
PROMPT = "Question: What is 7 + 5?\nAnswer:"
NEW = 12
BACKEND = select_backend(torch.device("cpu")).name


def expected(prompt: str, source: str | Path = TINY, **options: Any) -> tuple[str, list[int]]:
    """Text and tokens that the library generates for `prompt`."""
    text = Text(source)
    model = load_model(source, **options)
    results = generate(model, [text.encode(prompt)], max_new_tokens=NEW, stop_tokens=text.stop_tokens or None)
    return text.decode(results.tokens[0]), results.tokens[0]


def said(capsys: Capture, *arguments: str | Path, source: str | Path = TINY) -> Ended:
    ended = call(capsys, "generate", source, "--max-new-tokens", str(NEW), *arguments)
    assert ended.code == 0, ended.err
    return ended


def type_in(monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The embedded checkpoint as links in a folder, whose files can be replaced."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for file in Path(inspect(TINY).path).iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def put(file: Path, text: str | bytes) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())


def test_a_prompt_is_gone_on_from(capsys: Capture) -> None:
    ended = said(capsys, "--prompt", PROMPT)
    assert ended.out == expected(PROMPT)[0] + "\n"
    tokens = len(Text(TINY).encode(PROMPT))
    assert ended.error.startswith(f"{tokens} prompt tokens at ")
    assert ended.error.endswith(f" ({BACKEND} on cpu)")


def test_quiet_says_the_text_alone(capsys: Capture) -> None:
    ended = said(capsys, "--prompt", PROMPT, "-q")
    assert (ended.out, ended.err) == (expected(PROMPT)[0] + "\n", "")


def test_a_chat_goes_through_the_checkpoints_template(capsys: Capture) -> None:
    framed = Text(TINY).chat([{"role": "user", "content": "What is 2 + 2?"}])
    assert said(capsys, "--chat", "What is 2 + 2?").out == expected(framed)[0] + "\n"


def test_stdin_is_the_prompt_otherwise(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    type_in(monkeypatch, f"{PROMPT}\n".encode())
    assert said(capsys).out == expected(f"{PROMPT}\n")[0] + "\n"


def test_json_says_all_there_is_to_know(capsys: Capture) -> None:
    ended = said(capsys, "--prompt", PROMPT, "--json")
    text, tokens = expected(PROMPT)
    result = ended.json()
    assert ended.err == ""
    assert (result["text"], result["tokens"]) == (text, tokens)
    assert result["prompt_tokens"] == len(Text(TINY).encode(PROMPT))
    assert len(result["log_probabilities"]) == len(tokens)
    assert all(p <= 0 for p in result["log_probabilities"])
    assert (result["backend"], result["device"]) == (BACKEND, "cpu")
    assert result["prefill_seconds"] > 0
    assert result["decode_tokens_per_second"] > 0
    assert result["peak_memory_bytes"] > 0


@pytest.mark.parametrize("dtype", ["bf16", "f32", "f16"])
def test_the_compute_dtype_can_be_chosen(capsys: Capture, dtype: str) -> None:
    compute = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}[dtype]
    ended = said(capsys, "--prompt", PROMPT, "--dtype", dtype, "--json")
    assert ended.json()["tokens"] == expected(PROMPT, dtype=compute)[1]


@pytest.mark.parametrize("draft", [False, True])
def test_dense_weights_in_8_bits(capsys: Capture, draft: bool) -> None:
    """The draft is a checkpoint of its own: it is held in 8 bits as well, and accepted whole."""
    how = ("--draft", TINY) if draft else ()
    result = said(capsys, "--prompt", PROMPT, "--dtype", "f32", "--dense", "q8_0", "--json", *how).json()
    text, tokens = expected(PROMPT, dtype=torch.float32, dense="q8_0")
    assert (result["text"], result["tokens"]) == (text, tokens)
    if draft:
        assert result["speculation"]["acceptance"] == 1
    plain = said(capsys, "--prompt", PROMPT, "--dtype", "f32", "--json").json()
    assert plain["log_probabilities"] != result["log_probabilities"]


def test_a_plan_gives_what_the_pruned_checkpoint_gives(capsys: Capture, tmp_path: Path) -> None:
    plan = plan_random(4, 1, inspect(TINY))
    (tmp_path / "plan.json").write_text(plan.to_json())
    prune(TINY, tmp_path / "pruned", plan)
    printed = said(capsys, "--prompt", PROMPT, "--json", "--plan", tmp_path / "plan.json").json()
    pruned = said(capsys, "--prompt", PROMPT, "--json", source=tmp_path / "pruned").json()
    for key in ("text", "tokens", "log_probabilities"):
        assert printed[key] == pruned[key]
    assert printed["tokens"] == expected(PROMPT, plan=load_plan(tmp_path / "plan.json"))[1]
    assert printed["tokens"] != expected(PROMPT)[1]


def test_seeds_repeat_and_differ(capsys: Capture) -> None:
    def tokens(seed: int) -> list[int]:
        drawn = ("--temperature", "1.5", "--seed", str(seed))
        return list(said(capsys, "--prompt", PROMPT, "--json", *drawn).json()["tokens"])

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_filters_that_leave_one_token_are_greedy(capsys: Capture) -> None:
    greedy = expected(PROMPT)[1]
    for only in (("--sampling-top-k", "1"), ("--top-p", "1e-9"), ("--min-p", "1")):
        ended = said(capsys, "--prompt", PROMPT, "--json", "--temperature", "2", "--seed", "0", *only)
        assert ended.json()["tokens"] == greedy


def test_the_context_bounds_prompt_and_answer(capsys: Capture) -> None:
    length = len(Text(TINY).encode(PROMPT))
    ended = said(capsys, "--prompt", PROMPT, "--json", "--context", str(length + 3))
    assert ended.json()["tokens"] == expected(PROMPT)[1][:3]


def test_it_works_as_a_process_of_its_own() -> None:
    ended = run("generate", TINY, "--prompt", PROMPT, "--max-new-tokens", str(NEW), "-q")
    assert (ended.code, ended.out) == (0, expected(PROMPT)[0] + "\n")


# --- what cannot be


def refused(ended: Ended, code: int) -> str:
    assert (ended.code, ended.out) == (code, ""), ended.err
    assert ended.error.startswith("moe-surgery: ")
    assert ended.error.isprintable()
    return ended.error.removeprefix("moe-surgery: ")


OPTIONS: dict[str, tuple[list[str], int, str]] = {
    "prompt and chat": (["--chat", "b"], 2, "choose one of --prompt and --chat"),
    "unknown device": (
        ["--device", "gpu"],
        2,
        "--device gpu: unknown device; choose cpu, cuda, cuda:N or mps",
    ),
    "unknown backend": (["--backend", "magic"], 2, "--backend magic: unknown; known: "),
    "unknown dtype": (["--dtype", "f8"], 2, "Invalid value for '--dtype'"),
    "no new tokens": (["--max-new-tokens", "0"], 2, "--max-new-tokens 0: must be at least 1"),
    "no context": (["--context", "0"], 2, "--context 0: this model supports 1 to 4096 tokens"),
    "too much context": (["--context", "5000"], 2, "--context 5000: this model supports 1 to 4096 tokens"),
    "short context": (["--context", "3"], 2, "the prompt has 22 tokens, but the context is 3; shorten it"),
    "cold": (["--temperature", "-1"], 2, "--temperature -1.0: must be at least 0"),
    "no temperature": (["--temperature", "nan"], 2, "--temperature nan: must be"),
    "sampling top-k": (["--sampling-top-k", "-1"], 2, "--sampling-top-k -1: must not be negative"),
    "top-k below 1": (
        ["--top-k", "0"],
        2,
        "--top-k 0: example:tiny has 32 experts in a layer; choose 1 to 32",
    ),
    "top-k above the experts": (["--top-k", "33"], 2, "--top-k 33: example:tiny has 32 experts"),
    "top-p": (["--top-p", "0"], 2, "--top-p 0.0: must be above 0 and at most 1"),
    "min-p": (["--min-p", "2"], 2, "--min-p 2.0: must be between 0 and 1"),
    "seed": (["--seed", "-1"], 2, "--seed -1: must be between 0 and 2**63 - 1"),
    "large seed": (["--seed", str(1 << 64)], 2, f"--seed {1 << 64}: must be between 0 and"),
    "no plan": (["--plan", "/nowhere/plan.json"], 5, "/nowhere/plan.json: cannot open: No such file"),
}


@pytest.mark.parametrize(("options", "code", "line"), OPTIONS.values(), ids=OPTIONS)
def test_an_option_that_cannot_be_meant_is_one_line(
    capsys: Capture, options: list[str], code: int, line: str
) -> None:
    ended = call(capsys, "generate", TINY, "--prompt", PROMPT, *options)
    length = len(Text(TINY).encode(PROMPT))
    assert refused(ended, code).startswith(line.replace("22 tokens", f"{length} tokens"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda_is_one_line(capsys: Capture) -> None:
    ended = call(capsys, "generate", TINY, "--prompt", "a", "--device", "cuda")
    assert refused(ended, 2) == "--device cuda: torch finds no CUDA device here; see moe-surgery doctor"


def test_an_empty_prompt_is_one_line(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "the prompt is empty; pass --prompt TEXT, --chat TEXT, or text on stdin"
    assert refused(call(capsys, "generate", TINY, "--prompt", ""), 2) == line
    type_in(monkeypatch, b"")
    assert refused(call(capsys, "generate", TINY), 2) == line


def test_input_that_is_not_a_text_is_one_line(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    type_in(monkeypatch, b"caf\xe9 ")
    assert refused(call(capsys, "generate", TINY), 2) == "stdin: not UTF-8 at byte 3"
    ended = call(capsys, "generate", TINY, "--prompt", os.fsdecode(b"caf\xe9"))
    assert refused(ended, 2) == "the text is not Unicode at character 3"


def test_a_missing_tokenizer_is_one_line(capsys: Capture, tiny: Path) -> None:
    (tiny / "tokenizer.json").unlink()
    line = f"{tiny}/tokenizer.json: not found; copy the model's tokenizer.json there to use text"
    assert refused(call(capsys, "generate", tiny, "--prompt", "a"), 5) == line


def test_config_and_tensors_that_disagree_are_one_line(capsys: Capture, tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    put(tiny / "config.json", json.dumps({**config, "num_attention_heads": 4}))
    line = refused(call(capsys, "generate", tiny, "--prompt", "a"), 3)
    assert "self_attn.q_proj.weight" in line
    assert "shape [256, 160], expected [128, 160] from config.json" in line


def test_a_config_that_cannot_run_is_one_line(capsys: Capture, tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    put(tiny / "config.json", json.dumps({**config, "rope_scaling": {"rope_type": "linear", "factor": 2}}))
    line = "config.json: rope_type is the string 'linear'; known: default, yarn"
    assert refused(call(capsys, "generate", tiny, "--prompt", "a"), 3) == line


def test_a_tokenizer_of_another_model_is_one_line(capsys: Capture, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "other", Shape(vocabulary=24))
    shutil.copy(Path(inspect(TINY).path) / "tokenizer.json", folder)
    line = refused(call(capsys, "generate", folder, "--prompt", PROMPT), 2)
    assert line.endswith("is not one of the model's 24")


def test_a_plan_of_another_model_is_one_line(capsys: Capture, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", Shape(experts=8))
    (tmp_path / "plan.json").write_text(plan_random(4, 0, inspect(other)).to_json())
    line = refused(call(capsys, "generate", TINY, "--prompt", "a", "--plan", tmp_path / "plan.json"), 4)
    assert line.startswith("the plan is for gpt_oss with 2 layers of 8 experts, but example:tiny is gpt_oss")


TEMPLATES = {
    "reaching for a class": ("{{ messages.__class__ }}", "chat template: may not look at '__class__'"),
    "running code": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "may not look at '__class__'"),
    "several lines of error": ("{{ raise_exception('one\ntwo') }}", r"chat template: one\ntwo"),
    "no text": (b"\xff", "chat_template.jinja: not UTF-8 at byte 0"),
}


@pytest.mark.parametrize(("source", "line"), TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_that_may_not_or_cannot_is_one_line(
    capsys: Capture, tiny: Path, source: str | bytes, line: str
) -> None:
    put(tiny / "chat_template.jinja", source)
    assert refused(call(capsys, "generate", tiny, "--chat", "Hi"), 3).endswith(line)
    assert call(capsys, "generate", tiny, "--prompt", "Hi", "--max-new-tokens", "1").code == 0


def test_a_chat_without_a_template_is_one_line(capsys: Capture, tiny: Path) -> None:
    (tiny / "chat_template.jinja").unlink()
    line = refused(call(capsys, "generate", tiny, "--chat", "Hi"), 5)
    assert (
        line
        == f"{tiny}/chat_template.jinja: not found; this model has no chat template; give it a plain prompt"
    )


# --- speculation


@pytest.fixture(scope="module")
def plan8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plans") / "plan.json"
    file.write_text(plan_random(8, 1, inspect(TINY)).to_json())
    return file


@pytest.fixture(scope="module")
def pruned8(plan8: Path) -> Path:
    out = plan8.parent / "pruned"
    prune(TINY, out, load_plan(plan8))
    return out


@pytest.mark.parametrize("length", [(), ("--draft-length", "2"), ("--draft-length", "auto")])
@pytest.mark.parametrize("draft", ["checkpoint", "plan", "top-k"])
def test_speculation_says_the_models_own_text(
    capsys: Capture, plan8: Path, pruned8: Path, draft: str, length: tuple[str, ...]
) -> None:
    how: list[str | Path] = {
        "checkpoint": ["--draft", pruned8],
        "plan": ["--draft-plan", plan8, "--draft-top-k", "2"],
        "top-k": ["--draft-top-k", "1"],
    }[draft]
    ended = said(capsys, "--prompt", PROMPT, "--dtype", "f32", "--json", *how, *length)
    text, tokens = expected(PROMPT, dtype=torch.float32)
    result = ended.json()
    assert (result["text"], result["tokens"]) == (text, tokens)
    results = result["speculation"]
    assert results["tokens"] == len(tokens) - 1
    assert results["target_steps"] <= len(tokens) - 1
    assert len(results["acceptance_by_position"]) <= {"2": 2, "auto": 8}.get(length[1] if length else "", 4)
    assert results["target_cache_bytes"] > 0 < results["draft_cache_bytes"]


def test_a_draft_that_is_the_model_is_accepted_whole(capsys: Capture) -> None:
    ended = said(capsys, "--prompt", PROMPT, "--dtype", "f32", "--draft", TINY)
    assert ended.out == expected(PROMPT, dtype=torch.float32)[0] + "\n"
    assert ended.err.splitlines()[-1].startswith("100% of ")
    assert ended.err.splitlines()[-1].endswith(" tokens per target step")


DRAFTS: dict[str, tuple[list[str], int, str]] = {
    "two drafts": (
        ["--draft", TINY, "--draft-plan", "p.json"],
        2,
        "choose one of --draft and --draft-plan",
    ),
    "nothing drafts": (
        ["--draft-length", "2"],
        2,
        "--draft-length needs --draft, --draft-plan or",
    ),
    "no length": (
        ["--draft", TINY, "--draft-length", "0"],
        2,
        "--draft-length 0: must be 1 to 64, or auto",
    ),
    "a word": (["--draft", TINY, "--draft-length", "long"], 2, "--draft-length long: give a number of"),
    "no experts": (["--draft-top-k", "0"], 2, "--draft-top-k 0: must be at least 1"),
    "no plan": (["--draft-plan", "/nowhere/p.json"], 5, "/nowhere/p.json: cannot open: No such file"),
    "no draft": (["--draft", "/nowhere/model"], 5, "/nowhere/model"),
}


@pytest.mark.parametrize(("options", "code", "line"), DRAFTS.values(), ids=DRAFTS)
def test_a_draft_that_cannot_be_is_one_line(
    capsys: Capture, options: list[str], code: int, line: str
) -> None:
    assert refused(call(capsys, "generate", TINY, "--prompt", PROMPT, *options), code).startswith(line)


def test_a_draft_of_another_tokenizer_is_one_line(capsys: Capture, tiny: Path) -> None:
    tokenizer = json.loads((tiny / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    put(tiny / "tokenizer.json", json.dumps(tokenizer))
    line = refused(call(capsys, "generate", TINY, "--prompt", PROMPT, "--draft", tiny), 2)
    assert line == f"--draft {tiny}: its tokenizer has other token ids than that of {TINY}"
