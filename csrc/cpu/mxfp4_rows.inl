// Products with MXFP4 rows, 512 columns at a time.
#pragma once

#include "lane_math.inl"
#include "panels.inl"

namespace moe_surgery::cpu {
namespace {

template <class V>
struct Mxfp4 {
    using F = typename V::F;
    using Math = LaneMath<V>;

    // R rows from `row` on times T tokens.
    template <int R, int T>
    static void mxfp4_tile(const Mxfp4Rows& weight, std::ptrdiff_t row, const Quantized* x, float* y,
                           std::ptrdiff_t y_stride) {
        const std::uint8_t* blocks = weight.blocks + row * weight.block_stride;
        const std::uint8_t* scales = weight.scales + row * weight.scale_stride;
        const std::ptrdiff_t num_blocks = weight.columns / kBlock, full = num_blocks / kLanes;
        F sums[R][T];
        for (int r = 0; r < R; ++r) {
            for (int t = 0; t < T; ++t) sums[r][t] = V::zero();
        }
        for (std::ptrdiff_t s = 0; s < full; ++s) {
            multiply_act_block<R, T>(x, s, sums, [&](int r, typename V::Packed& packed, F& scale) {
                const std::uint8_t* from = blocks + r * weight.block_stride + s * kActBlockBytes;
                for (int line = 0; line < kActBlockBytes; line += 64) prefetch(from + kAhead + line);
                packed = V::packed(from);
                scale = V::scales(scales + r * weight.scale_stride + s * kLanes);
            });
        }
        if (full * kLanes < num_blocks) {
            const std::ptrdiff_t count = num_blocks - full * kLanes;
            multiply_act_block<R, T>(x, full, sums, [&](int r, typename V::Packed& packed, F& scale) {
                const std::uint8_t* from = blocks + r * weight.block_stride + full * kActBlockBytes;
                for (std::ptrdiff_t line = 0; line < count * kBlockBytes; line += 64) prefetch(from + kAhead + line);
                std::uint8_t padded[kLanes] = {};
                __builtin_memcpy(padded, scales + r * weight.scale_stride + full * kLanes, static_cast<std::size_t>(count));
                packed = V::packed_of(from, static_cast<int>(count));
                scale = V::scales(padded);
            });
        }
        for (int r = 0; r < R; ++r) {
            for (int t = 0; t < T; ++t) y[t * y_stride + r] = V::sum(sums[r][t]);
        }
    }

    // `at(r, packed, scale)` loads row r's codes and scales for ActBlock512 s.
    template <int R, int T, class At>
    static inline void multiply_act_block(const Quantized* x, std::ptrdiff_t s, F (&sums)[R][T], At at) {
        typename V::Packed packed[R];
        F scales[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) at(r, packed[r], scales[r]);
        add_products<R, T>(packed, scales, x, s, sums);
    }

    // Adds the products with ActBlock512 s; weights are Packed or Decoded.
    template <int R, int T, class Weights>
    static inline void add_products(const Weights (&weights)[R], const F (&scales)[R], const Quantized* x, std::ptrdiff_t s,
                                    F (&sums)[R][T]) {
        const ActBlock512* act_blocks[T];
        for (int t = 0; t < T; ++t) act_blocks[t] = x[t] + s;
        typename V::I dots[R][T];
        V::template multiply<R, T>(weights, act_blocks, dots);
        for (int t = 0; t < T; ++t) {
            const F factors = V::load(act_blocks[t]->factors);
            for (int r = 0; r < R; ++r) {
                sums[r][t] = V::fma(V::to_float(dots[r][t]), V::mul(factors, scales[r]), sums[r][t]);
            }
        }
    }

    template <int R>
    static void mxfp4_some_rows(const Mxfp4Rows& weight, std::ptrdiff_t row, const Quantized* x,
                                std::ptrdiff_t tokens, float* y, std::ptrdiff_t y_stride) {
        std::ptrdiff_t t = 0;
        const auto run = [&](auto tile, std::ptrdiff_t count) {
            tile(weight, row, x + t, y + t * y_stride, y_stride);
            t += count;
        };
        while (tokens - t >= 4 && tokens - t != 5) run(mxfp4_tile<R, 4>, 4);
        if (tokens - t >= 3) run(mxfp4_tile<R, 3>, 3);  // of five, so that none is left alone
        if (tokens - t == 2) run(mxfp4_tile<R, 2>, 2);
        if (tokens - t == 1) run(mxfp4_tile<R, 1>, 1);
    }

    // Many tokens: some rows are decoded once for all tokens of a panel, 512 columns at a time.
    static void mxfp4_panels(const Mxfp4Rows& weight, std::ptrdiff_t first, std::ptrdiff_t last, const Quantized* x,
                             std::ptrdiff_t tokens, float* y, std::ptrdiff_t y_stride) {
        const auto add = [&](auto rows, const typename Panels<V>::Part& part) {
            constexpr int R = rows();
            typename V::Decoded decoded[R];
            F scales[R];
            for (int r = 0; r < R; ++r) decode(weight, part.row + r, part.step, decoded[r], scales[r]);
            Panels<V>::template for_tokens<R, V::kDecodedTokens>(part, [&](std::ptrdiff_t t, auto& sums) {
                add_products(decoded, scales, x + t, part.step, sums);
            });
        };
        Panels<V>::template multiply<V::kDecodedRows>(first, last, tokens, act_blocks_of(weight.columns), y, y_stride, add);
    }

    // Columns 512 s .. of a row.
    static inline void decode(const Mxfp4Rows& weight, std::ptrdiff_t row, std::ptrdiff_t s, typename V::Decoded& decoded,
                              F& scale) {
        const std::uint8_t* from = weight.blocks + row * weight.block_stride + s * kActBlockBytes;
        const std::ptrdiff_t count = min_of(kLanes, weight.columns / kBlock - s * kLanes);
        for (std::ptrdiff_t line = 0; line < count * kBlockBytes; line += 64) prefetch(from + kAhead + line);
        std::uint8_t padded[kLanes] = {};
        __builtin_memcpy(padded, weight.scales + row * weight.scale_stride + s * kLanes, static_cast<std::size_t>(count));
        scale = V::scales(padded);
        decoded = V::decode(count == kLanes ? V::packed(from) : V::packed_of(from, static_cast<int>(count)));
    }

    static void mxfp4_rows(const Mxfp4Rows& weight, std::ptrdiff_t first, std::ptrdiff_t last,
                           const Quantized* x, std::ptrdiff_t tokens, float* y, std::ptrdiff_t y_stride) {
        if (tokens >= kManyTokens) {
            mxfp4_panels(weight, first, last, x, tokens, y, y_stride);
            return;
        }
        std::ptrdiff_t r = first;
        for (; last - r >= V::kPackedRows; r += V::kPackedRows) {
            mxfp4_some_rows<V::kPackedRows>(weight, r, x, tokens, y + r - first, y_stride);
        }
        for (; r < last; ++r) mxfp4_some_rows<1>(weight, r, x, tokens, y + r - first, y_stride);
    }
};

}  // namespace
}  // namespace moe_surgery::cpu
