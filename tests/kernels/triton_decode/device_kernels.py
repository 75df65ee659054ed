"""Every fused kernel of a decode step against the runtime's plain PyTorch, outputs poisoned beforehand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import product

import pytest
import torch

from moe_surgery.kernels.reference.attention import attention as reference_attention
from moe_surgery.kernels.reference.attention import visible
from moe_surgery.kernels.reference.dense import apply_rope, linear, rms_norm
from moe_surgery.kernels.triton.decode import attention as attention_module
from moe_surgery.kernels.triton.decode.attention import attention, kv_splits_for
from moe_surgery.kernels.triton.decode.fused_projections import KVWrite, ProjectionInput, output, qkv, unembed
from moe_surgery.kernels.triton.decode.norm import residual_norm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
EPS = 1e-5
# Two and more tokens share a block, 9 need a wider one, 70 a second column of programs.
TOKENS = (1, 2, 5, 9, 70)
# bfloat16 sums in another order than torch, each rounded once: a few units in the last place of the largest.
FLOATS = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def combined(*choices: Sequence[object]) -> list[tuple[object, ...]]:
    """All combinations on a GPU; in the interpreter and under a sanitizer, which are slow, as few as hold every
    value."""
    if ON_GPU and "MOE_SURGERY_FEW_TESTS" not in os.environ:
        return list(product(*choices))
    return [tuple(c[n % len(c)] for c in choices) for n in range(max(map(len, choices)))]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed + 7 * len(shape) + shape[0])
    return torch.randn(shape, generator=random).to(DEVICE, dtype)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def near(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = (got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-6)
    assert error <= TOLERANCE[dtype], float(error)  # NaN fails too


def needs_fp32(dtype: torch.dtype) -> bool:
    return dtype != torch.bfloat16 or not ON_GPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [32, 96, 160])
@pytest.mark.parametrize("tokens", [1, 5])
def test_residual_norm(tokens: int, hidden: int, dtype: torch.dtype) -> None:
    x, y, norm_weight = (draw(n, hidden, dtype=dtype, seed=n) for n in (tokens, tokens, 1))
    total, h = poisoned(tokens, hidden, dtype=dtype), poisoned(tokens, hidden, dtype=dtype)
    residual_norm(x, y, norm_weight[0], h, EPS, total).run()
    summed = (x.float() + y.float()).to(dtype)
    assert torch.equal(total, summed)
    near(h, rms_norm(summed, norm_weight[0], EPS), dtype)


def test_residual_norm_of_chosen_rows() -> None:
    table, norm_weight, row_ids = draw(11, 96), draw(1, 96)[0], torch.tensor([10, 0, 10], device=DEVICE)
    total, h = poisoned(3, 96), poisoned(3, 96)
    residual_norm(table, None, norm_weight, h, EPS, total, row_ids).run()
    assert torch.equal(total, table[row_ids])
    near(h, rms_norm(table[row_ids], norm_weight, EPS), torch.float32)


def test_the_sum_may_replace_what_was_added_to() -> None:
    x, y, norm_weight, h = draw(2, 64), draw(2, 64, seed=1), draw(1, 64)[0], poisoned(2, 64)
    expected = x + y
    residual_norm(x, y, norm_weight, h, EPS, x).run()
    assert torch.equal(x, expected)


SHAPES = {
    "halves of one piece": (4, 2, 16, 64),
    "halves of several pieces": (3, 1, 64, 96),
    "a half that is not a power of two": (2, 2, 12, 160),
    "a half smaller than a piece": (6, 3, 6, 32),
}


@pytest.mark.parametrize(("tokens", "name", "dtype"), combined(TOKENS, list(SHAPES), FLOATS))
def test_qkv(tokens: int, name: str, dtype: torch.dtype) -> None:
    heads, kv_heads, head_dim, hidden = SHAPES[name]
    slots, cache_position = 9, 13  # a ring that has gone round: slot 4
    rows = (heads + 2 * kv_heads) * head_dim
    h, weight, bias = (draw(n, hidden, dtype=dtype, seed=n) for n in (tokens, rows, 1))
    weight, bias = weight / hidden**0.5, draw(rows, dtype=dtype)
    pads = torch.arange(tokens, device=DEVICE) % 4
    angles = draw(40, head_dim // 2)
    kv_write = KVWrite(
        draw(tokens, kv_heads, slots, head_dim, dtype=dtype), draw(tokens, kv_heads, slots, head_dim, dtype=dtype),
        torch.full((tokens, slots), -7, device=DEVICE), torch.tensor([cache_position], device=DEVICE), pads,
        angles.cos(), angles.sin(),
    )  # fmt: skip
    keys, values = kv_write.keys.clone(), kv_write.values.clone()
    q = poisoned(tokens, heads * head_dim, dtype=dtype)
    qkv(ProjectionInput(h), weight, bias, q, kv_write, needs_fp32(dtype)).run()

    expected = linear(h, weight, bias).view(tokens, heads + 2 * kv_heads, head_dim)
    cos, sin = (t[cache_position - pads][:, None] for t in (kv_write.cos, kv_write.sin))
    rotated = apply_rope(expected[:, : heads + kv_heads], cos, sin)
    near(q, rotated[:, :heads].flatten(1), dtype)
    near(kv_write.keys[:, :, 4], rotated[:, heads:], dtype)
    near(kv_write.values[:, :, 4], expected[:, heads + kv_heads :], dtype)
    others = [s for s in range(slots) if s != 4]
    assert torch.equal(kv_write.keys[:, :, others], keys[:, :, others])
    assert torch.equal(kv_write.values[:, :, others], values[:, :, others])
    assert torch.equal(kv_write.positions[:, 4], cache_position - pads)
    assert (kv_write.positions[:, others] == -7).all()


@pytest.mark.parametrize("gathered", [False, True])
def test_qkv_of_one_token_norms_its_input_itself(gathered: bool) -> None:
    heads, kv_heads, head_dim, hidden = 4, 2, 8, 160
    weight, bias = draw(64, hidden) / 12, draw(64)
    table, y, norm_weight = draw(5, hidden), draw(1, hidden, seed=1), draw(1, hidden, seed=2)[0]
    x, total, q = table[3:4].contiguous(), poisoned(1, hidden), poisoned(1, 32)
    zeros = torch.zeros(1, 2, 4, head_dim, device=DEVICE)
    one = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    kv_write = KVWrite(
        zeros, zeros.clone(), one.new_zeros(1, 4), one, one.clone(), draw(4, 4).cos(), draw(4, 4).sin()
    )
    h = poisoned(1, hidden)
    row_ids = torch.tensor([3], device=DEVICE)
    source = (table, None, row_ids) if gathered else (x, y, None)
    inputs = ProjectionInput(h, *source, norm_weight, total, EPS)
    qkv(inputs, weight, bias, q, kv_write, needs_fp32(torch.float32)).run()
    summed = x if gathered else x + y
    assert torch.equal(total, summed)
    expected = linear(rms_norm(summed, norm_weight, EPS), weight, bias).view(
        1, heads + 2 * kv_heads, head_dim
    )
    near(
        q,
        apply_rope(expected[:, :heads], kv_write.cos[:1, None], kv_write.sin[:1, None]).flatten(1),
        torch.float32,
    )
    near(kv_write.values[:, :, 0], expected[:, heads + kv_heads :], torch.float32)


@pytest.mark.parametrize(
    ("tokens", "size", "dtype"), combined(TOKENS, ((96, 64), (33, 160), (40, 1056)), FLOATS)
)
def test_output(tokens: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    rows, columns = size
    x, residual = draw(tokens, columns, dtype=dtype), draw(tokens, rows, dtype=dtype)
    weight, bias = draw(rows, columns, dtype=dtype) / columns**0.5, draw(rows, dtype=dtype)
    out = poisoned(tokens, rows, dtype=dtype)
    output(x, residual, weight, bias, out, needs_fp32(dtype)).run()
    near(out, residual + linear(x, weight, bias), dtype)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("rows", "hidden"), [(24, 64), (101, 96)])
def test_unembed(rows: int, hidden: int, tokens: int) -> None:
    h, weight, logits = draw(tokens, hidden), draw(rows, hidden), poisoned(tokens, rows)
    cache_position = torch.tensor([41], device=DEVICE)
    unembed(ProjectionInput(h), weight, logits, cache_position, needs_fp32(torch.float32)).run()
    near(logits, linear(h, weight), torch.float32)
    assert cache_position.item() == 42


def test_unembed_of_one_token_norms_its_input_itself() -> None:
    x, y, norm_weight, weight = draw(1, 96), draw(1, 96, seed=1), draw(1, 96, seed=2)[0], draw(50, 96)
    total, logits, cache_position = poisoned(1, 96), poisoned(1, 50), torch.tensor([0], device=DEVICE)
    unembed(
        ProjectionInput(total, x, y, None, norm_weight, total, EPS),
        weight,
        logits,
        cache_position,
        needs_fp32(torch.float32),
    ).run()
    near(logits, linear(rms_norm(x + y, norm_weight, EPS), weight), torch.float32)


CACHES = {
    # slots, tokens so far (the last is the new one), window
    "one token only": (70, 1, None),
    "partly filled": (200, 100, None),
    "filled to the last": (64, 64, None),
    "a window in a long cache": (200, 150, 20),
    "a ring not yet full": (40, 30, 33),
    "a ring gone round": (40, 95, 33),
    "a ring of several blocks gone round": (150, 400, 140),
}


@pytest.mark.parametrize(
    ("name", "shape", "multiprocessors"),
    combined(list(CACHES), ((8, 1, 16), (6, 2, 12), (3, 3, 64)), (1, 132)),
)
def test_attention(name: str, shape: tuple[int, int, int], multiprocessors: int) -> None:
    slots, length, window = CACHES[name]
    heads, kv_heads, head_dim = shape
    batch = 3
    pads = torch.tensor([0, 2, length - 1], device=DEVICE)
    positions = torch.full((batch, slots), -1, device=DEVICE)
    for token in range(max(0, length - slots), length):
        positions[:, token % slots] = torch.where(token < pads, -1, token - pads)
    q = draw(batch, heads * head_dim)
    keys, values = draw(batch, kv_heads, slots, head_dim), draw(batch, kv_heads, slots, head_dim, seed=1)
    sinks = draw(heads, seed=2)
    cache_position = torch.tensor([length - 1], device=DEVICE)
    out = poisoned(batch, heads * head_dim)
    args = (
        q,
        keys,
        values,
        positions,
        cache_position,
        pads,
        sinks,
        window,
        out,
        multiprocessors,
        needs_fp32(torch.float32),
    )
    attention(*args).run()
    now = (length - 1 - pads)[:, None]
    expected = reference_attention(
        q.view(batch, heads, 1, head_dim), keys, values, sinks, visible(now, positions, window)
    )
    near(out, expected[:, 0], torch.float32)
    attention(*args).run()  # the counters are back where they were
    near(out, expected[:, 0], torch.float32)


def test_attention_survives_large_scores_and_lone_sinks() -> None:
    q = torch.full((1, 16), 40.0, device=DEVICE)
    keys, values = draw(1, 1, 8, 16) * 40, draw(1, 1, 8, 16)
    positions = torch.arange(8, device=DEVICE)[None]
    zero, cache_position = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.tensor([7], device=DEVICE)
    for sink in (-1e4, 0.0, 1e4):
        out, sinks = poisoned(1, 16), torch.tensor([sink], device=DEVICE)
        attention(
            q, keys, values, positions, cache_position, zero, sinks, None, out, 132, needs_fp32(torch.float32)
        ).run()
        seen = visible(cache_position[None], positions, None)
        expected = reference_attention(q.view(1, 1, 1, 16), keys, values, sinks, seen)[:, 0]
        assert (out - expected).abs().max() <= 1e-4


def test_splits_fill_the_chip_without_empty_programs() -> None:
    assert kv_splits_for(8, 1024, 132) == 16
    assert kv_splits_for(8, 144, 132) == 3
    assert kv_splits_for(8, 131072, 132) == attention_module.MAX_KV_SPLITS
    assert kv_splits_for(256, 131072, 132) == 2
    assert kv_splits_for(1 << 20, 4096, 132) == 1


@pytest.mark.skipif(not ON_GPU, reason="the interpreter's BF16 products are wrong; on a GPU only")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_narrow_types(dtype: torch.dtype) -> None:
    batch, heads, kv_heads, head_dim, slots = 4, 64, 8, 64, 1024
    q, sinks = draw(batch, heads * head_dim, dtype=dtype), draw(heads, dtype=dtype)
    keys = draw(batch, kv_heads, slots, head_dim, dtype=dtype)
    values = draw(batch, kv_heads, slots, head_dim, dtype=dtype, seed=1)
    positions = torch.arange(slots, device=DEVICE).expand(batch, -1).contiguous()
    cache_position, pads = (
        torch.tensor([slots - 1], device=DEVICE),
        torch.zeros(batch, dtype=torch.int64, device=DEVICE),
    )
    out = poisoned(batch, heads * head_dim, dtype=dtype)
    attention(
        q, keys, values, positions, cache_position, pads, sinks, None, out, 132, needs_fp32(dtype)
    ).run()
    seen = visible((cache_position - pads)[:, None], positions, None)
    in_float32 = (t.float() for t in (q.view(batch, heads, 1, head_dim), keys, values, sinks))
    near(out, reference_attention(*in_float32, seen)[:, 0], dtype)
