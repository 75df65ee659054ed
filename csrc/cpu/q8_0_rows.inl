// Products with rows of Q8_0, 512 columns at a time.
#pragma once

#include "lane_math.inl"

namespace moe_surgery::cpu {
namespace {

template <class V>
struct Q8_0 {
    using F = typename V::F;
    using Math = LaneMath<V>;

    // R rows from `row` on times T tokens.
    template <int R, int T>
    static void q8_0_tile(const DenseRows& weight, std::ptrdiff_t row, const Words* x, float* y,
                          std::ptrdiff_t y_stride) {
        const std::uint8_t* codes = weight.data + row * weight.stride;
        const std::uint8_t* scales = codes + weight.columns;
        const std::ptrdiff_t num_blocks = weight.columns / kBlock, full = num_blocks / kLanes;
        const std::ptrdiff_t ahead = R * weight.stride > kAhead ? R * weight.stride : kAhead;
        F sums[R][T];
        for (int r = 0; r < R; ++r) {
            for (int t = 0; t < T; ++t) sums[r][t] = V::zero();
        }
        for (std::ptrdiff_t s = 0; s < full; ++s) {
            multiply<R, T>(codes + s * kActBlock, weight.stride, kLanes, ahead, x, s, sums, [&](int r) {
                const std::uint8_t* from = scales + r * weight.stride + 2 * s * kLanes;
                prefetch(from + ahead);
                return V::f16(from);
            });
        }
        if (const std::ptrdiff_t count = num_blocks - full * kLanes) {
            multiply<R, T>(codes + full * kActBlock, weight.stride, count, ahead, x, full, sums, [&](int r) {
                const std::uint8_t* from = scales + r * weight.stride + 2 * full * kLanes;
                prefetch(from + ahead);
                return Math::template lanes_partial<typename Math::F16>(from, count);
            });
        }
        for (int r = 0; r < R; ++r) {
            for (int t = 0; t < T; ++t) y[t * y_stride + r] = V::sum(sums[r][t]);
        }
    }

    // `count` blocks of each row with WordBlock512 s, prefetching what is `ahead`. Where there are fewer than 16, the
    // vectors of codes reach past theirs, to bytes of the same row (see q8_0_row_bytes), which meet activations of 0.
    template <int R, int T, class Scales>
    static inline void multiply(const std::uint8_t* codes, std::ptrdiff_t stride, std::ptrdiff_t count, std::ptrdiff_t ahead,
                                const Words* x, std::ptrdiff_t s, F (&sums)[R][T], Scales scales_of) {
        const WordBlock512* word_blocks[T];
        for (int t = 0; t < T; ++t) word_blocks[t] = x[t] + s;
        typename V::I dots[R][T];
        V::template multiply_words<R, T>(codes, stride, 2 * count, ahead, word_blocks, dots);
        for (int r = 0; r < R; ++r) {
            const F scales = scales_of(r);
            for (int t = 0; t < T; ++t) {
                const F factors = V::load(word_blocks[t]->factors);
                sums[r][t] = V::fma(V::to_float(dots[r][t]), V::mul(factors, scales), sums[r][t]);
            }
        }
    }

    // All rows for T tokens before the next ones: activations stay in the L1 cache, codes in L2.
    template <int T>
    static void q8_0_some_tokens(const DenseRows& weight, std::ptrdiff_t first, std::ptrdiff_t last, const Words* x,
                                 float* y, std::ptrdiff_t y_stride) {
        std::ptrdiff_t r = first;
        for (; last - r >= V::kWordRows; r += V::kWordRows) {
            q8_0_tile<V::kWordRows, T>(weight, r, x, y + r - first, y_stride);
        }
        for (; r < last; ++r) q8_0_tile<1, T>(weight, r, x, y + r - first, y_stride);
    }

    static void q8_0_rows(const DenseRows& weight, std::ptrdiff_t first, std::ptrdiff_t last, const Words* x,
                          std::ptrdiff_t tokens, float* y, std::ptrdiff_t y_stride) {
        std::ptrdiff_t t = 0;
        const auto run = [&](auto some_tokens, std::ptrdiff_t count) {
            for (; tokens - t >= count; t += count) some_tokens(weight, first, last, x + t, y + t * y_stride, y_stride);
        };
        if constexpr (V::kWordTokens >= 4) run(q8_0_some_tokens<4>, 4);
        run(q8_0_some_tokens<2>, 2);
        run(q8_0_some_tokens<1>, 1);
    }
};

}  // namespace
}  // namespace moe_surgery::cpu
