"""The whole decode step against the runtime's plain forward pass: same cache, same logits, step after step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_surgery import inspect, load_model, plan_random
from moe_surgery.errors import UsageError
from moe_surgery.kernels.interface import DecoderModel
from moe_surgery.kernels.triton.decode.launches import launch_count
from moe_surgery.kernels.triton.decode.qkv_weights import join_qkv
from moe_surgery.kernels.triton.decode.step import DecodeStep
from moe_surgery.kernels.triton.tuning import DeviceProps
from moe_surgery.runtime.cache import Cache
from moe_surgery.runtime.generate import generate
from moe_surgery.runtime.model import CausalLM
from moe_surgery.runtime.speculation.speculate import speculate
from moe_surgery.runtime.view import view
from tests.runtime.models import write_lively
from tests.support.checkpoints import Shape

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
WINDOW, ROLLBACK, VOCABULARY = 4, 3, 40
# The interpreter takes most of a second for a step of even this.
SHAPE = Shape(
    layers=5 if ON_GPU else 2,
    experts=5,
    top_k=2,
    hidden=96 if ON_GPU else 32,
    intermediate=32,
    vocabulary=VOCABULARY,
)
STEPS = 20 if ON_GPU else 2
CASES = [(1, None), (1, 1), (3, 3), (9, None)] if ON_GPU else [(1, None), (2, 3), (6, None)]
TOLERANCE = 1e-4
# Interpreted tests cannot capture; on a GPU both ways must give the same.
CAPTURES = (True, False) if ON_GPU else (False,)
LAYOUTS = ("mxfp4", "bf16") if ON_GPU else ("mxfp4",)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs programs one by one, so splitting work over many gains nothing."""
    if not ON_GPU:
        monkeypatch.setattr(
            "moe_surgery.kernels.triton.tuning.get_device_props", lambda device: DeviceProps(90, 2)
        )


@pytest.fixture(scope="module", params=LAYOUTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("step") / request.param
    return write_lively(folder, SHAPE, request.param, edit_config=lambda c: c.update(sliding_window=WINDOW))


def models(folder: Path, keep: int | None = None) -> tuple[CausalLM, CausalLM]:
    """The same weights twice, in float32: with triton and with plain PyTorch."""
    result = []
    for backend in ("triton", "reference"):
        plan = None
        if keep is not None:
            from moe_surgery import Checkpoint, identify_model

            with Checkpoint.open(folder) as checkpoint:
                plan = plan_random(keep, 1, identify_model(checkpoint))
        result.append(load_model(folder, DEVICE, torch.float32, plan, backend=backend))
    return result[0], result[1]


def prefilled(
    model: CausalLM, batch: int, context: int, mask: torch.Tensor | None, prompt: torch.Tensor
) -> Cache:
    cache = model.new_cache(batch, context, rollback=ROLLBACK)
    model(prompt, cache, mask)
    return cache


def prompts(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and a mask in which later sequences have more padding."""
    random = torch.Generator().manual_seed(batch)
    tokens = torch.randint(0, VOCABULARY, (batch, length), generator=random).to(DEVICE)
    pads = torch.arange(batch)[:, None] % 3
    return tokens, (torch.arange(length)[None] >= pads).long().to(DEVICE)


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize(("batch", "keep"), CASES)
def test_every_step_gives_the_logits_of_the_plain_forward_pass(
    folder: Path, batch: int, keep: int | None, capture: bool
) -> None:
    ours, plain = models(folder, keep)
    prompt, mask = prompts(batch, 6)
    caches = [prefilled(m, batch, 30, mask, prompt) for m in (plain, plain)]
    step = DecodeStep(ours.decoder_model(), caches[0], capture=capture)
    tokens = prompt[:, -1]
    for number in range(STEPS):  # the rings of 7 slots go round
        expected = plain(tokens[:, None], caches[1])[:, 0]
        with torch.inference_mode():
            step.logits.fill_(float("nan"))
        result = step(tokens)
        torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCE, msg=f"step {number}")
        tokens = expected.argmax(-1)
    same_cache(*caches)


def same_cache(one: Cache, other: Cache) -> None:
    assert one.length == other.length
    for slots, positions in other.positions.items():
        assert torch.equal(one.positions[slots], positions)
    for layer in range(len(other.keys)):
        torch.testing.assert_close(one.keys[layer], other.keys[layer], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(one.values[layer], other.values[layer], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("capture", CAPTURES)
def test_truncation_and_prefill_in_between_are_followed(folder: Path, capture: bool) -> None:
    ours, plain = models(folder)
    prompt, mask = prompts(2, 7)
    caches = [prefilled(m, 2, 24, mask, prompt) for m in (plain, plain)]
    step = DecodeStep(ours.decoder_model(), caches[0], capture=capture)
    for _ in range(2):
        step(prompt[:, 0])
        plain(prompt[:, :1], caches[1])
    for cache in caches:
        cache.truncate(7)
        plain(prompt[:, :1], cache)
    result, expected = step(prompt[:, 1]), plain(prompt[:, 1:2], caches[1])[:, 0]
    torch.testing.assert_close(result, expected, rtol=0, atol=TOLERANCE)
    same_cache(*caches)


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_launches_match_the_count(folder: Path, batch: int) -> None:
    ours, plain = models(folder)
    prompt, mask = prompts(batch, 4)
    step = DecodeStep(ours.decoder_model(), prefilled(plain, batch, 8, mask, prompt), capture=False)
    assert step.launches == launch_count(SHAPE.layers, SHAPE.experts, SHAPE.top_k, batch).step


def test_projections_are_joined_once_and_the_model_stays_the_same(folder: Path) -> None:
    ours, plain = models(folder)
    prompt, mask = prompts(2, 5)
    first = [layer.q.weight.data_ptr() for layer in ours.layers]
    for layer in ours.layers:  # as loaded
        assert join_qkv(layer) is layer
    assert all(join_qkv(layer) is not layer for layer in plain.layers)
    DecodeStep(ours.decoder_model(), prefilled(plain, 2, 6, mask, prompt), capture=False)
    assert [layer.q.weight.data_ptr() for layer in ours.layers] == first
    ours.backend = plain.backend
    torch.testing.assert_close(
        ours(prompt, None, mask), plain(prompt, None, mask), rtol=0, atol=1e-6, equal_nan=True
    )


def test_what_cannot_be_done_is_refused(folder: Path) -> None:
    ours, plain = models(folder)
    prompt, mask = prompts(2, 5)
    cache = prefilled(plain, 2, 6, mask, prompt)
    other = prefilled(load_model(folder, DEVICE, torch.bfloat16, backend="reference"), 2, 6, mask, prompt)
    with pytest.raises(UsageError, match="made for another dtype"):
        DecodeStep(ours.decoder_model(), other)
    assert ours.decode_step(other) is None
    assert plain.decode_step(cache) is None
    step = DecodeStep(ours.decoder_model(), cache, capture=False)
    with pytest.raises(UsageError, match=r"tokens \(3,\), needed \(2,\)"):
        step(torch.zeros(3, dtype=torch.int64, device=DEVICE))
    with pytest.raises(UsageError, match="token 40 is not one of"):
        step(torch.tensor([1, 40]))
    assert cache.length == 5
    step(prompt[:, 0])
    with pytest.raises(UsageError, match="do not fit the context of 6"):
        step(prompt[:, 0])
    with pytest.raises(UsageError, match="do not fit the context of 6"):
        DecodeStep(ours.decoder_model(), cache)


def test_layers_not_joined_at_loading_give_the_same_step(folder: Path) -> None:
    ours, plain = models(folder)
    prompt, mask = prompts(1, 5)
    whole = ours.decoder_model()
    apart = DecoderModel(
        plain.layers, whole.shape, whole.embedding, whole.norm, whole.unembedding, whole.rope, whole.dtype
    )
    result = [
        DecodeStep(model, prefilled(plain, 1, 7, mask, prompt), capture=False)(prompt[:, 0])
        for model in (whole, apart)
    ]
    assert torch.equal(*result)


def test_a_view_changes_nothing_of_its_model(folder: Path) -> None:
    model, plain = models(folder)
    model.layers = plain.layers  # q, k and v apart, as no captured step has seen them
    before = list(model.layers)
    for drawn in (view(model, plan_random(4, 0, inspect(folder))), view(model, None, 1)):
        assert all(one is other for one, other in zip(model.layers, before, strict=True))
        for one, other in zip(model.layers, drawn.layers, strict=True):
            assert one.q.weight.data_ptr() == other.q.weight.data_ptr()


def test_a_view_that_drafts_step_by_step_leaves_the_output_the_targets(folder: Path) -> None:
    """Draft steps are captured and rolled back where tokens are rejected; q, k and v are shared."""
    target, plain = models(folder)
    draft = view(target, plan_random(3, 0, inspect(folder)))
    prompt, new = [[3, 1, 4, 1, 5, 9]], 40 if ON_GPU else 4
    expected = generate(plain, prompt, max_new_tokens=new, stop_tokens=()).tokens
    result = speculate(target, draft, prompt, draft_length=2, max_new_tokens=new, stop_tokens=())
    assert result.tokens == expected
    assert 0 < sum(result.statistics.accepted) < sum(result.statistics.drafted)
    for one, other in zip(target.layers, draft.layers, strict=True):
        assert one.q.weight.data_ptr() == other.q.weight.data_ptr()
