// Products with dense rows: a row at a time, columns in groups of 32.
#pragma once

#include "lane_math.inl"
#include "panels.inl"

namespace moe_surgery::cpu {
namespace {

template <class V>
struct Dense {
    using F = typename V::F;
    using Math = LaneMath<V>;

    // R rows from `w` on times T tokens.
    template <class W, int R, int T>
    static void dense_tile(const std::uint8_t* w, std::ptrdiff_t stride, std::ptrdiff_t columns, const Deinterleaved* x,
                          float* y, std::ptrdiff_t y_stride) {
        F sums[R][T];
        for (int r = 0; r < R; ++r) {
            for (int t = 0; t < T; ++t) sums[r][t] = V::zero();
        }
        add_groups<W, R, T>(w, stride, columns, 0, groups_of(columns), x, sums);
        for (int r = 0; r < R; ++r) {
            for (int t = 0; t < T; ++t) y[t * y_stride + r] = V::sum(sums[r][t]);
        }
    }

    // Adds the products of groups first .. last.
    template <class W, int R, int T>
    static inline void add_groups(const std::uint8_t* w, std::ptrdiff_t stride, std::ptrdiff_t columns, std::ptrdiff_t first,
                                  std::ptrdiff_t last, const Deinterleaved* x, F (&sums)[R][T]) {
        const std::ptrdiff_t full = min_of(last, columns / kGroup), ahead = R * stride > kAhead ? R * stride : kAhead;
        for (std::ptrdiff_t g = first; g < full; ++g) {
            multiply<W, R, T>(x, g, sums, [&](int r) {
                const std::uint8_t* from = w + r * stride + W::kBytes * kGroup * g;
                for (int line = 0; line < W::kBytes * kGroup; line += 64) prefetch(from + ahead + line);
                return from;
            });
        }
        if (full < last) {
            std::uint8_t padded[R][W::kBytes * kGroup] = {};
            const std::ptrdiff_t start = W::kBytes * kGroup * full;
            for (int r = 0; r < R; ++r) {
                __builtin_memcpy(padded[r], w + r * stride + start, static_cast<std::size_t>(W::kBytes * columns - start));
            }
            multiply<W, R, T>(x, full, sums, [&](int r) { return padded[r]; });
        }
    }

    template <class W>
    static void dense_panels(const DenseRows& weight, std::ptrdiff_t first, std::ptrdiff_t last, const Deinterleaved* x,
                             std::ptrdiff_t tokens, float* y, std::ptrdiff_t y_stride) {
        constexpr std::ptrdiff_t kGroupsAtOnce = 15;
        const std::ptrdiff_t groups = groups_of(weight.columns), steps = (groups + kGroupsAtOnce - 1) / kGroupsAtOnce;
        const auto add = [&](auto rows, const typename Panels<V>::Part& part) {
            const std::ptrdiff_t start = part.step * kGroupsAtOnce, end = min_of(groups, start + kGroupsAtOnce);
            const std::uint8_t* w = weight.data + part.row * weight.stride;
            Panels<V>::template for_tokens<rows(), V::kTokens>(part, [&](std::ptrdiff_t t, auto& sums) {
                add_groups<W>(w, weight.stride, weight.columns, start, end, x + t, sums);
            });
        };
        Panels<V>::template multiply<V::kRows>(first, last, tokens, steps, y, y_stride, add);
    }

    // `at(r)` is the address of group g of row r.
    template <class W, int R, int T, class At>
    static inline void multiply(const Deinterleaved* x, std::ptrdiff_t g, F (&sums)[R][T], At at) {
        F x_even[T], x_odd[T];
        for (int t = 0; t < T; ++t) {
            x_even[t] = V::load(x[t] + kGroup * g);
            x_odd[t] = V::load(x[t] + kGroup * g + kLanes);
        }
        for (int r = 0; r < R; ++r) {
            F w_even, w_odd;
            W::pairs(at(r), w_even, w_odd);
            for (int t = 0; t < T; ++t) {
                sums[r][t] = V::fma(w_odd, x_odd[t], V::fma(w_even, x_even[t], sums[r][t]));
            }
        }
    }

    template <class W, int R>
    static void dense_some_rows(const std::uint8_t* w, const DenseRows& weight, const Deinterleaved* x,
                                std::ptrdiff_t tokens, float* y, std::ptrdiff_t y_stride) {
        std::ptrdiff_t t = 0;
        const auto run = [&](auto tile, std::ptrdiff_t count) {
            for (; tokens - t >= count; t += count) {
                tile(w, weight.stride, weight.columns, x + t, y + t * y_stride, y_stride);
            }
        };
        if constexpr (V::kTokens >= 4) run(dense_tile<W, R, 4>, 4);
        if constexpr (V::kTokens >= 3) run(dense_tile<W, R, 3>, 3);
        run(dense_tile<W, R, 2>, 2);
        run(dense_tile<W, R, 1>, 1);
    }

    static void dense_rows(const DenseRows& weight, std::ptrdiff_t first, std::ptrdiff_t last, const Deinterleaved* x,
                           std::ptrdiff_t tokens, float* y, std::ptrdiff_t y_stride) {
        Math::with(weight.dtype, [&](auto dtype) {
            using W = decltype(dtype);
            if (tokens >= kManyTokens) {
                dense_panels<W>(weight, first, last, x, tokens, y, y_stride);
                return;
            }
            std::ptrdiff_t r = first;
            for (; last - r >= V::kRows; r += V::kRows) {
                const std::uint8_t* w = weight.data + r * weight.stride;
                dense_some_rows<W, V::kRows>(w, weight, x, tokens, y + r - first, y_stride);
            }
            for (; r < last; ++r) {
                dense_some_rows<W, 1>(weight.data + r * weight.stride, weight, x, tokens, y + r - first, y_stride);
            }
        });
    }
};

}  // namespace
}  // namespace moe_surgery::cpu
