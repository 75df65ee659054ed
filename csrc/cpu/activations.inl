// Activations laid out as the products read them.
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
            const std::ptrdiff_t place = c / kGroup * kGroup + c % 2 * kLanes + c % kGroup / 2;
            out[place] = c < columns ? x[c] : 0.0f;
        }
    }

    static void quantize(const float* x, std::ptrdiff_t columns, ActBlock512* spans) {
        for (std::ptrdiff_t s = 0; s < act_blocks_of(columns); ++s) {
            for (std::ptrdiff_t lane = 0; lane < kLanes; ++lane) {
                const std::ptrdiff_t start = s * kActBlock + block_of(lane) * kBlock;
                static constexpr float kNone[kBlock] = {};
                quantize_block(start < columns ? x + start : kNone, spans[s], lane);
            }
        }
    }

    static void quantize_block(const float* x, ActBlock512& span, std::ptrdiff_t lane) {
        float most = 0.0f;
        bool finite = true;
        for (int i = 0; i < kBlock; ++i) {
            const float size = __builtin_fabsf(x[i]);
            most = size > most ? size : most;
            finite &= size <= 3.402823466e38f;
        }
        // Below this the inverse would overflow; such values count as zeros.
        const bool zero = most < 1e-30f;
        const F up = V::set(zero ? 0.0f : kQuantMax / most);
        std::int16_t quantized[kBlock];
        for (int i = 0; i < kBlock; i += kLanes) {
            V::store_rounded(quantized + i, finite ? V::mul(V::load(x + i), up) : V::zero());
        }
        std::int32_t sum = 0;
        for (int i = 0; i < kBlock; ++i) {
            const int vector = i / 8 * 2 + i % 2, byte = static_cast<int>(4 * lane) + i % 8 / 2;
            const int low = static_cast<std::int8_t>(quantized[i] & 255);
            span.low[vector][byte] = static_cast<std::int8_t>(low);
            span.high[vector][byte] = static_cast<std::int8_t>((quantized[i] - low) / 256);
            sum += quantized[i];
        }
        span.starts[lane] = -12 * sum;
        // Half, because weights are looked up as twice their value; NaN where the input had no number.
        const float down = zero ? 0.0f : most / kQuantMax * 0.5f;
        span.factors[lane] = finite ? down : from_bits(0x7fc00000u);
    }
};

}  // namespace
}  // namespace moe_surgery::cpu
