"""`dense="q8_0"`: the matrices say what the export's say, and logits are those of a model with these values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moe_surgery import export_gguf, inspect, load_model, plan_random, prune  # noqa: E402
from moe_surgery.errors import InvalidInputError, UsageError  # noqa: E402
from moe_surgery.kernels.q8_0 import Q8Matrix  # noqa: E402
from moe_surgery.kernels.weights import Projection  # noqa: E402
from moe_surgery.runtime.generate import generate  # noqa: E402
from moe_surgery.runtime.model import CausalLM  # noqa: E402
from moe_surgery.runtime.speculation.speculate import speculate  # noqa: E402
from moe_surgery.runtime.step_bytes import model_step_bytes, usable_bytes, weight_bytes  # noqa: E402
from moe_surgery.runtime.view import view  # noqa: E402
from tests.export.reading import Read, read  # noqa: E402
from tests.kernels.native_cases import native, needs_native  # noqa: E402
from tests.runtime.conftest import SMALL  # noqa: E402
from tests.runtime.models import write_lively  # noqa: E402
from tests.support.checkpoints import LAYOUTS, Tensors  # noqa: E402

TOLERANCE = {"reference": 1e-4, "native": 2e-3}
ATTENTION = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}


def exported(folder: Path, out: Path) -> Read:
    export_gguf(folder, out, dense="q8_0", tokenizer=False)
    return read(out)


def values(file: Read, name: str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(file.values(name)))


def with_values(model: CausalLM, file: Read) -> CausalLM:
    """`model` with attention and unembedding as float32 tensors with the values of the GGUF file."""
    model.unembedding = values(file, "output.weight")
    model.layers = [
        replace(
            layer,
            **{
                part: Projection(values(file, f"blk.{number}.{name}.weight"), getattr(layer, part).bias)
                for part, name in ATTENTION.items()
            },
        )
        for number, layer in enumerate(model.layers)
    ]
    return model


def draw_ids(batch: int, tokens: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(batch))


@pytest.fixture(scope="module")
def tiny_file(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Read:
    return exported(tiny, tmp_path_factory.mktemp("q8_0") / "tiny.gguf")


def check_values(model: CausalLM, stored: CausalLM, file: Read) -> None:
    """Attention and unembedding are the file's; everything else is what is loaded without `dense`."""
    assert (model.dense, stored.dense) == ("q8_0", "keep")
    assert isinstance(model.unembedding, Q8Matrix)
    assert torch.equal(model.unembedding.dequantise(), values(file, "output.weight"))
    assert torch.equal(model.embedding, stored.embedding)
    for number, (layer, plain) in enumerate(zip(model.layers, stored.layers, strict=True)):
        for part, name in ATTENTION.items():
            weight = getattr(layer, part).weight
            assert isinstance(weight, Q8Matrix)
            assert torch.equal(weight.dequantise(), values(file, f"blk.{number}.{name}.weight"))
            assert torch.equal(getattr(layer, part).bias, getattr(plain, part).bias)
        assert torch.equal(layer.router.weight, plain.router.weight)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_matrices_are_those_of_the_export(layout: str, tmp_path: Path) -> None:
    folder = write_lively(tmp_path / "in", SMALL, layout)
    file = exported(folder, tmp_path / "model.gguf")
    check_values(load_model(folder, dense="q8_0"), load_model(folder), file)


def test_a_tied_unembedding_is_quantised_and_the_embedding_is_not(tmp_path: Path) -> None:
    folder = write_lively(
        tmp_path / "in",
        SMALL,
        edit_tensors=lambda t: t.pop("lm_head.weight"),
        edit_config=lambda c: c.update(tie_word_embeddings=True),
    )
    file = exported(folder, tmp_path / "model.gguf")
    check_values(load_model(folder, dense="q8_0"), load_model(folder), file)


@dataclass(frozen=True)
class Logits:
    """Of the reference in float32, for `ids`: with matrices as stored, and with the values of the file."""

    ids: torch.Tensor
    stored: torch.Tensor
    quantised: torch.Tensor


@pytest.fixture(scope="module")
def expected(tiny: Path, tiny_file: Read) -> Logits:
    ids = draw_ids(1, 64, 2048)
    model = load_model(tiny, dtype=torch.float32, backend="reference")
    stored = model(ids)
    return Logits(ids, stored, with_values(model, tiny_file)(ids))


def test_logits_are_those_of_a_model_with_the_files_values(
    tiny: Path, expected: Logits, backend: str
) -> None:
    got = load_model(tiny, dtype=torch.float32, backend=backend, dense="q8_0")(expected.ids)
    worst = (got - expected.quantised).abs().amax(dim=-1).flatten()
    # Rounding activations to 16 bits sends a token to another expert now and then.
    assert (worst.max() if backend == "reference" else worst.median()) <= TOLERANCE[backend]
    assert (expected.stored - expected.quantised).abs().amax(dim=-1).median() > 10 * worst.median()


def test_half_precision_is_as_near_as_with_bf16_matrices(tiny: Path, expected: Logits, backend: str) -> None:
    def error(logits: torch.Tensor, of: torch.Tensor) -> float:
        return float((logits - of).norm(dim=-1).median())

    kept, q8_0 = (
        load_model(tiny, dtype=torch.bfloat16, backend=backend, dense=d)(expected.ids)
        for d in ("keep", "q8_0")
    )
    assert error(q8_0, expected.quantised) <= 1.5 * error(kept, expected.stored)


# --- bits


def in_pieces(model: CausalLM, ids: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    cache = model.new_cache(ids.shape[0], ids.shape[1] + 20)
    return torch.cat([model(ids[:, a:b], cache) for a, b in pairwise(cuts)], dim=1)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_of_up_to_16_tokens_give_the_bits_of_one_token_at_a_time(
    small: Path, dtype: torch.dtype
) -> None:
    model = load_model(small, dtype=dtype, backend="native", dense="q8_0")
    ids = draw_ids(3, 48, SMALL.vocabulary)
    model.backend = native("", 1)
    one_by_one = in_pieces(model, ids, [*range(49)])
    for threads, step in ((1, 2), (2, 3), (3, 5), (2, 8), (2, 16)):
        model.backend, model._fused = native("", threads), None
        assert torch.equal(in_pieces(model, ids, [*range(0, 48, step), 48]), one_by_one), step
    assert torch.equal(in_pieces(model, ids[:1], [0, 16, 32, 48]), one_by_one[:1])


@needs_native
def test_a_stack_gives_what_its_layers_give(small: Path) -> None:
    ids = draw_ids(2, 30, SMALL.vocabulary)
    model = load_model(small, dtype=torch.float32, backend="native", dense="q8_0")
    assert model._fused_layers() is not None
    stacked = in_pieces(model, ids, [0, 20, 21, 30])
    model._fused = (model.layers, None)
    assert torch.equal(in_pieces(model, ids, [0, 20, 21, 30]), stacked)


@needs_native
@pytest.mark.parametrize(("experts", "length", "rows"), [(8, 4, 1), (16, 8, 3)])
def test_speculation_gives_what_generation_gives(tiny: Path, experts: int, length: int, rows: int) -> None:
    target = load_model(tiny, backend="native", dense="q8_0")
    draft = view(target, plan_random(experts, 0, inspect(tiny)))
    assert weight_bytes(draft, shared_with=target) < weight_bytes(target) / 100
    prompts = draw_ids(rows, 12, 2048).tolist()
    expected = generate(target, prompts, max_new_tokens=24, stop_tokens=())
    result = speculate(target, draft, prompts, draft_length=length, max_new_tokens=24, stop_tokens=())
    assert result.tokens == expected.tokens
    assert result.log_probabilities == expected.log_probabilities


def test_a_view_has_the_logits_of_the_pruned_checkpoint(small: Path, backend: str, tmp_path: Path) -> None:
    plan = plan_random(3, 1, inspect(small))
    prune(small, tmp_path / "pruned", plan)
    ids = draw_ids(2, 20, SMALL.vocabulary)
    expected = load_model(tmp_path / "pruned", backend=backend, dense="q8_0")(ids)
    assert torch.equal(view(load_model(small, backend=backend, dense="q8_0"), plan)(ids), expected)
    assert torch.equal(load_model(small, backend=backend, dense="q8_0", plan=plan)(ids), expected)


def test_one_layer_at_a_time_holds_the_same_matrices(small: Path) -> None:
    whole, one = (load_model(small, dense="q8_0", one_layer=o) for o in (False, True))
    for number, layer in enumerate(whole.layers):
        for part in ATTENTION:
            assert torch.equal(
                getattr(one.layers[number], part).weight.data, getattr(layer, part).weight.data
            )


# --- what is counted, and what is refused


def test_a_step_reads_half_the_bytes_of_attention_and_unembedding(tiny: Path) -> None:
    kept, q8_0 = (load_model(tiny, dense=d) for d in ("keep", "q8_0"))
    matrices = [kept.unembedding, *(getattr(layer, p).weight for layer in kept.layers for p in ATTENTION)]
    saved = sum(m.numel() * 2 - len(m) * -(-m.shape[1] // 32 * 34 // 64) * 64 for m in matrices)
    assert model_step_bytes(kept) - model_step_bytes(q8_0) == saved > 0
    assert usable_bytes(kept) - usable_bytes(q8_0) == saved
    assert q8_0.computation == {**kept.computation, "dense": "q8_0"}


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "lm_head.weight"])
def test_a_value_that_q8_0_cannot_hold_is_named(name: str, tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[name][3, 40] = 0x7FC0

    folder = write_lively(tmp_path / "in", SMALL, edit_tensors=edit)
    with pytest.raises(
        InvalidInputError, match=rf"model.*\.safetensors: tensor '{name}', row 3: values from 32: a NaN"
    ):
        load_model(folder, dense="q8_0")
    load_model(folder)


def test_another_format_is_refused(small: Path) -> None:
    with pytest.raises(UsageError, match=r"^`dense` q4_0: choose one of keep, q8_0$"):
        load_model(small, dense="q4_0")
