"""Bytes of a decode step, counted for gpt-oss-20b and compared with sums by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch")

from moe_surgery.families.model_config import ModelConfig, RopeParameters
from moe_surgery.runtime.decode_cost import bytes_per_token, distinct_experts

WINDOWS = tuple(128 if i % 2 == 0 else None for i in range(24))
GPT_OSS_20B = ModelConfig(
    24, 2880, 2880, 64, 8, 64, 201088, 32, 4, 131072, WINDOWS, RopeParameters(150000.0), 1e-5, 7.0, 1.702, ()
)  # fmt: skip


def test_bytes_of_one_token_are_those_of_its_weights_and_its_cache() -> None:
    read = bytes_per_token(GPT_OSS_20B, experts=32, batch=1, context=1024)
    # 4 experts of 13.24 MB in 24 layers; q, k, v, o; the unembedding and one row of the embedding.
    assert read.experts == pytest.approx(24 * 4 * (3 * 2880 * 2880 * 17 / 32 + 3 * 2880 * 2))
    assert read.experts == pytest.approx(1.271e9, rel=1e-3)
    assert read.attention == 24 * 2 * (5120 * 2880 + 5120 + 2880 * 4096 + 2880 + 64)
    assert read.vocabulary == 201089 * 2880 * 2
    # 12 layers see 128 positions, 12 all 1024; keys and values of 8 heads of 64.
    assert read.cache == 12 * (128 + 1024) * 2 * 8 * 64 * 2
    assert read.step == read.token == pytest.approx(3.72e9, rel=0.01)


def test_experts_narrower_than_the_model_are_counted_with_their_size() -> None:
    """gpt-oss's inner size is its hidden size; other models' are not."""
    narrow = replace(GPT_OSS_20B, intermediate_size=768)
    for packed, width in ((True, 17 / 32), (False, 2)):
        expert = (2 * 768 * 2880 + 768 * 2880) * width + (2 * 768 + 2880) * 2
        read = bytes_per_token(narrow, 8, 1, 1024, packed)
        assert read.experts == pytest.approx(24 * 4 * expert)
        assert read.attention == bytes_per_token(GPT_OSS_20B, 8, 1, 1024, packed).attention


def test_a_batch_shares_the_weights_but_not_the_cache() -> None:
    one, eight = (bytes_per_token(GPT_OSS_20B, 32, batch, 1024) for batch in (1, 8))
    assert eight.cache == 8 * one.cache
    assert eight.attention == one.attention
    assert eight.token < one.token / 2
    assert eight.step == eight.token * 8


@pytest.mark.parametrize(("batch", "expected"), [(1, 4), (4, 13), (8, 21), (16, 28), (64, 32)])
def test_distinct_experts_of_32_with_top_4(batch: int, expected: int) -> None:
    assert round(distinct_experts(32, 4, batch)) == expected


def test_fewer_experts_than_the_top_k_are_all_read() -> None:
    assert distinct_experts(3, 4, 1) == 3
    assert bytes_per_token(GPT_OSS_20B, 3, 1, 1).experts == pytest.approx(
        bytes_per_token(GPT_OSS_20B, 32, 1, 1).experts * 3 / 4
    )


def test_bf16_experts_are_about_four_times_as_large() -> None:
    packed, dense = (bytes_per_token(GPT_OSS_20B, 8, 1, 1024, packed=p) for p in (True, False))
    assert dense.experts / packed.experts == pytest.approx(32 / 8.5, rel=1e-3)
    assert dense.attention == packed.attention
