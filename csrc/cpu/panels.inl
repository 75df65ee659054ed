// Products of many tokens: panels of some rows for some tokens, a range of columns after the other, so that what is
// multiplied lies in the L1 cache. Sums stay lanes until the last column: the bits are those of single tokens.
#pragma once

#include <type_traits>

#include "lane_math.inl"

namespace moe_surgery::cpu {
namespace {

// Panels are used from kManyTokens on.
constexpr std::ptrdiff_t kManyTokens = 16, kPanelRows = 32, kPanelTokens = 16;

template <class V>
struct Panels {
    using F = typename V::F;
    using Sums = F (*)[kPanelTokens];

    // Of a panel: some rows from `row` on, `tokens` from `token` on and their sums, and a range of columns.
    struct Part {
        std::ptrdiff_t row, token, tokens, step;
        Sums sums;
    };

    // y[t * y_stride + r - first] for rows first .. last is the sum of what `add(rows, part)` adds in `steps` steps, for
    // R rows at a time or one (`rows`, an integral_constant).
    template <int R, class Add>
    static void multiply(std::ptrdiff_t first, std::ptrdiff_t last, std::ptrdiff_t tokens, std::ptrdiff_t steps, float* y,
                         std::ptrdiff_t y_stride, Add add) {
        for (std::ptrdiff_t t = 0; t < tokens; t += kPanelTokens) {
            for (std::ptrdiff_t r = first; r < last; r += kPanelRows) {
                panel<R>(r, min_of(last, r + kPanelRows), t, min_of(kPanelTokens, tokens - t), steps,
                         y + t * y_stride + r - first, y_stride, add);
            }
        }
    }

    // `add(token, sums)` for T tokens of `part` at a time, then for single ones, with their F[R][T] of its sums.
    template <int R, int T, class Add>
    static inline void for_tokens(const Part& part, Add add) {
        std::ptrdiff_t t = 0;
        const auto run = [&](auto width) {
            constexpr int N = width();
            for (; part.tokens - t >= N; t += N) {
                F some[R][N];
                for (int r = 0; r < R; ++r) {
                    for (int i = 0; i < N; ++i) some[r][i] = part.sums[r][t + i];
                }
                add(part.token + t, some);
                for (int r = 0; r < R; ++r) {
                    for (int i = 0; i < N; ++i) part.sums[r][t + i] = some[r][i];
                }
            }
        };
        run(std::integral_constant<int, T>{});
        run(std::integral_constant<int, 1>{});
    }

  private:
    template <int R, class Add>
    static void panel(std::ptrdiff_t first, std::ptrdiff_t last, std::ptrdiff_t token, std::ptrdiff_t tokens,
                      std::ptrdiff_t steps, float* y, std::ptrdiff_t y_stride, Add add) {
        F sums[kPanelRows][kPanelTokens];
        for (auto& row : sums) {
            for (F& sum : row) sum = V::zero();
        }
        for (std::ptrdiff_t step = 0; step < steps; ++step) {
            std::ptrdiff_t r = first;
            const auto part = [&] { return Part{r, token, tokens, step, sums + (r - first)}; };
            for (; last - r >= R; r += R) add(std::integral_constant<int, R>{}, part());
            for (; r < last; ++r) add(std::integral_constant<int, 1>{}, part());
        }
        for (std::ptrdiff_t r = 0; r < last - first; ++r) {
            for (std::ptrdiff_t t = 0; t < tokens; ++t) y[t * y_stride + r] = V::sum(sums[r][t]);
        }
    }
};

}  // namespace
}  // namespace moe_surgery::cpu
