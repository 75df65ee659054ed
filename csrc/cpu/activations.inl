// Activations in the layouts that the products read.
#pragma once

#include "lane_math.inl"

namespace moe_surgery::cpu {
namespace {

template <class V>
struct Activations {
    using F = typename V::F;
    using Math = LaneMath<V>;

    static void deinterleave(const float* x, std::ptrdiff_t columns, float* out) {
        for (std::ptrdiff_t c = 0; c < groups_of(columns) * kGroup; ++c) {
            const std::ptrdiff_t to = c / kGroup * kGroup + c % 2 * kLanes + c % kGroup / 2;
            out[to] = c < columns ? x[c] : 0.0f;
        }
    }

    static void quantize(const float* x, std::ptrdiff_t columns, ActBlock512* act_blocks) {
        for (std::ptrdiff_t s = 0; s < act_blocks_of(columns); ++s) {
            for (std::ptrdiff_t lane = 0; lane < kLanes; ++lane) {
                const std::ptrdiff_t start = s * kActBlock + block_of(lane) * kBlock;
                static constexpr float kZeros[kBlock] = {};
                quantize_block(start < columns ? x + start : kZeros, act_blocks[s], lane);
            }
        }
    }

    static void quantize_block(const float* x, ActBlock512& act_block, std::ptrdiff_t lane) {
        std::int16_t quantized[kBlock];
        // Half, because the table holds doubled weights.
        act_block.factors[lane] = round_block(x, quantized) * 0.5f;
        std::int32_t sum = 0;
        for (int i = 0; i < kBlock; ++i) {
            const int vector = i / 8 * 2 + i % 2, byte = static_cast<int>(4 * lane) + i % 8 / 2;
            const int low = static_cast<std::int8_t>(quantized[i] & 255);
            act_block.low[vector][byte] = static_cast<std::int8_t>(low);
            act_block.high[vector][byte] = static_cast<std::int8_t>((quantized[i] - low) / 256);
            sum += quantized[i];
        }
        act_block.starts[lane] = -12 * sum;
    }

    static void quantize_words(const float* x, std::ptrdiff_t columns, WordBlock512* word_blocks) {
        for (std::ptrdiff_t s = 0; s < act_blocks_of(columns); ++s) {
            WordBlock512& words = word_blocks[s];
            for (std::ptrdiff_t lane = 0; lane < kLanes; ++lane) {
                const std::ptrdiff_t start = s * kActBlock + lane * kBlock;
                std::int16_t quantized[kBlock] = {};
                words.factors[lane] = start < columns ? round_block(x + start, quantized) : 0.0f;
                for (int i = 0; i < kBlock; ++i) words.words[i / 2][2 * lane + i % 2] = quantized[i];
            }
        }
    }

    // 32 values as integers up to kQuantMax times the result, which is NaN where a value is not finite.
    static float round_block(const float* x, std::int16_t* quantized) {
        float absmax = 0.0f;
        bool finite = true;
        for (int i = 0; i < kBlock; ++i) {
            const float size = __builtin_fabsf(x[i]);
            absmax = size > absmax ? size : absmax;
            finite &= size <= 3.402823466e38f;
        }
        // Below this the inverse would overflow; such blocks count as zeros.
        const bool zero = absmax < 1e-30f;
        const F scale = V::set(zero ? 0.0f : kQuantMax / absmax);
        for (int i = 0; i < kBlock; i += kLanes) {
            V::store_rounded(quantized + i, finite ? V::mul(V::load(x + i), scale) : V::zero());
        }
        if (!finite) return from_bits(0x7fc00000u);
        return zero ? 0.0f : absmax / kQuantMax;
    }
};

}  // namespace
}  // namespace moe_surgery::cpu
