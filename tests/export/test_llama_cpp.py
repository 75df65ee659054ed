"""llama.cpp loads an export and computes the same as transformers, within its rounding.

llama.cpp rounds the borders of YaRN's ramp to whole dimensions, which gpt-oss does not ("truncate": false):
so does the reference, except where our own runtime is compared. In front of MXFP4 weights it rounds
activations to 8 bits.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import random
import shutil
import textwrap
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed: pip install llama-cpp-python builds it"
)

import torch  # noqa: E402

from benchmarks.make_tokenizer import make_tokenizer  # noqa: E402
from moe_surgery import export_gguf, load_model, plan_random, prune  # noqa: E402
from moe_surgery.checkpoint.resolve import resolve  # noqa: E402
from moe_surgery.runtime.text import Text  # noqa: E402
from tests.export.reading import digest, read  # noqa: E402
from tests.support import oracle  # noqa: E402
from tests.support.checkpoints import Shape, write_checkpoint  # noqa: E402
from tests.support.sums import arithmetic  # noqa: E402

COUNTS = (32, 31, 8, 3, 1)
TOKENS = 200  # more than three windows
BOUND, MEDIAN_BOUND = 2e-2, 1e-2
"""Where the router's logits nearly tie, rounding changes the route of single tokens."""
OWN_BOUND = 5e-5
TEXTS = (
    "Question: What is 12 + 30?\nAnswer: 42.\n\n",
    "def f(x):\n\treturn x  +   1  # naïve 日本語 🚀\r\n\r\n   end",
    "It's they'LL WE'RE CamelCase ABCdef 1234567 3.14e-10 ...!?\u00a0x",
)


def load(path: Path, **options: object) -> llama_cpp.Llama:
    return llama_cpp.Llama(str(path), n_ctx=512, n_batch=512, n_threads=1, verbose=False, **options)


@pytest.fixture(scope="module")
def texts() -> dict[str, list[int]]:
    text = Text("example:tiny")
    return {
        "sums": text.encode(arithmetic(random.Random(0), 1600))[:TOKENS],
        "code": text.encode(inspect.getsource(textwrap))[:TOKENS],
    }


def relative(got: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Error by norm over all tokens, and of the median token."""
    errors = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float((got - expected).norm() / expected.norm()), float(errors.median())


def load_reference(source: Path, folder: Path) -> torch.nn.Module:
    """The model in `source` by transformers, the borders of YaRN's ramp rounded as llama.cpp rounds them."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    scaling = config.get("rope_scaling") or config["rope_parameters"]
    assert scaling["truncate"] is False
    scaling["truncate"] = True
    (folder / "config.json").write_text(json.dumps(config))
    return oracle.load_model(folder)


@pytest.mark.parametrize("count", COUNTS)
def test_logits_of_the_embedded_model_and_what_is_left_of_it(
    count: int, texts: dict[str, list[int]], tmp_path: Path
) -> None:
    source = resolve("example:tiny")
    if count < COUNTS[0]:
        source = tmp_path / "pruned"
        prune("example:tiny", source, lambda model: plan_random(count, count, model))
    export_gguf(source, tmp_path / "model.gguf")
    llama = load(tmp_path / "model.gguf", logits_all=True)
    reference = load_reference(source, tmp_path / "rounded")
    exact, ours = oracle.load_model(source), load_model(source, dtype=torch.float32)
    for tokens in texts.values():
        llama.reset()
        llama.eval(tokens)
        ids = torch.tensor([tokens])
        expected = oracle.logits_of(reference, ids)[0]
        assert expected.std() > 0.5
        error, median = relative(torch.from_numpy(np.array(llama.scores[: len(tokens)])), expected)
        assert error <= BOUND
        assert median <= MEDIAN_BOUND
        assert relative(ours(ids)[0], oracle.logits_of(exact, ids)[0])[0] <= OWN_BOUND


def test_the_same_text_is_the_same_tokens(tmp_path: Path) -> None:
    export_gguf("example:tiny", tmp_path / "model.gguf")
    llama, text = load(tmp_path / "model.gguf"), Text("example:tiny")
    for sample in (*TEXTS, "<|start|>user<|message|>Hello<|end|>", inspect.getsource(textwrap)):
        assert llama.tokenize(sample.encode(), add_bos=False, special=True) == text.encode(sample)


def test_a_tokenizer_of_gpt_oss_kind_splits_the_same(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", Shape(layers=1, vocabulary=4096))
    make_tokenizer(source, 4096)
    export_gguf(source, tmp_path / "model.gguf")
    llama, text = load(tmp_path / "model.gguf"), Text(source)
    for sample in TEXTS:
        tokens = llama.tokenize(sample.encode(), add_bos=False, special=True)
        assert tokens == text.encode(sample)
        assert llama.detokenize(tokens).decode() == sample
    sample = "<|start|>user<|message|>Hello<|end|>"
    assert llama.tokenize(sample.encode(), add_bos=False, special=True) == text.encode(sample)


def test_bf16_experts_give_what_mxfp4_ones_give(texts: dict[str, list[int]], tmp_path: Path) -> None:
    prune("example:tiny", tmp_path / "bf16", lambda m: plan_random(8, 8, m), store="bf16")
    reference = load_reference(tmp_path / "bf16", tmp_path / "rounded")
    for dtype in ("keep", "mxfp4"):
        export_gguf(tmp_path / "bf16", tmp_path / f"{dtype}.gguf", store=dtype)
        llama = load(tmp_path / f"{dtype}.gguf", logits_all=True)
        llama.eval(texts["code"])
        expected = oracle.logits_of(reference, torch.tensor([texts["code"]]))[0]
        _, median = relative(torch.from_numpy(np.array(llama.scores[:TOKENS])), expected)
        assert median <= MEDIAN_BOUND


def test_q8_0_matrices_give_what_bf16_ones_give(texts: dict[str, list[int]], tmp_path: Path) -> None:
    """What Q8_0 changes is less than what llama.cpp's rounding of YaRN's ramp and of activations does."""
    exact = oracle.load_model(resolve("example:tiny"))
    reference = load_reference(resolve("example:tiny"), tmp_path / "rounded")
    files = {dense: tmp_path / f"{dense}.gguf" for dense in ("keep", "q8_0")}
    for dense, path in files.items():
        export_gguf("example:tiny", path, dense=dense)
    ours = load_model(tmp_path / "rounded", dtype=torch.float32, dense="q8_0")
    ours.embedding = torch.from_numpy(read(files["q8_0"]).values("token_embd.weight"))
    for tokens in texts.values():
        logits = {}
        for dense, path in files.items():
            llama = load(path, logits_all=True)
            llama.eval(tokens)
            logits[dense] = torch.from_numpy(np.array(llama.scores[: len(tokens)]))
        ids = torch.tensor([tokens])
        own = relative(logits["keep"], oracle.logits_of(exact, ids)[0])
        for changed, bound in zip(relative(logits["q8_0"], logits["keep"]), own, strict=True):
            assert 0 < changed <= 1.25 * bound
        assert relative(logits["q8_0"], oracle.logits_of(reference, ids)[0])[1] <= 2 * MEDIAN_BOUND
        assert relative(logits["q8_0"], ours(ids)[0])[1] <= 2 * MEDIAN_BOUND


def test_llama_quantize_writes_the_same_q8_0_file(tmp_path: Path) -> None:
    """Tensors and metadata of its MXFP4_MOE, made from the export with BF16 matrices."""
    export_gguf("example:tiny", tmp_path / "bf16.gguf", name="same")
    export_gguf("example:tiny", tmp_path / "q8_0.gguf", name="same", dense="q8_0")
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_MXFP4_MOE, 1
    paths = [str(tmp_path / name).encode() for name in ("bf16.gguf", "theirs.gguf")]
    assert llama_cpp.llama_model_quantize(*paths, ctypes.byref(options)) == 0
    ours, theirs = read(tmp_path / "q8_0.gguf"), read(tmp_path / "theirs.gguf")
    assert digest(ours) == digest(theirs)
    assert ours.metadata == theirs.metadata


def test_a_file_without_tokenizer_runs_on_token_numbers(texts: dict[str, list[int]], tmp_path: Path) -> None:
    export_gguf("example:tiny", tmp_path / "with.gguf")
    export_gguf("example:tiny", tmp_path / "without.gguf", tokenizer=False)
    result = []
    for name in ("with", "without"):
        llama = load(tmp_path / f"{name}.gguf", logits_all=True)
        llama.eval(texts["sums"])
        result.append(np.array(llama.scores[:TOKENS]))
    assert result[0].tobytes() == result[1].tobytes()


def test_the_chat_template_is_taken_from_the_file(tmp_path: Path) -> None:
    export_gguf("example:tiny", tmp_path / "model.gguf")
    template = load(tmp_path / "model.gguf").metadata["tokenizer.chat_template"]
    assert template == (resolve("example:tiny") / "chat_template.jinja").read_text()
