// Products with dense weights stored transposed: a column at a time.
#pragma once

#include "lane_math.inl"

namespace moe_surgery::cpu {
namespace {

template <class V>
struct DenseTransposed {
    using F = typename V::F;
    using Math = LaneMath<V>;

    static void dense_transposed(const DenseRows& weight, std::ptrdiff_t first, std::ptrdiff_t last,
                                 const float* const* x, std::ptrdiff_t tokens, float* y,
                                 std::ptrdiff_t y_stride) {
        Math::with(weight.dtype, [&](auto dtype) {
            transposed<decltype(dtype)>(weight, first, last, x, tokens, y, y_stride);
        });
    }

    template <class W>
    static void transposed(const DenseRows& weight, std::ptrdiff_t first, std::ptrdiff_t last,
                           const float* const* x, std::ptrdiff_t tokens, float* y, std::ptrdiff_t y_stride) {
        for (std::ptrdiff_t t = 0; t < tokens; ++t) {
            __builtin_memset(y + t * y_stride, 0, static_cast<std::size_t>(last - first) * sizeof(float));
        }
        constexpr std::ptrdiff_t kDepth = 64;  // columns between a load and a store of the sums
        constexpr std::ptrdiff_t kTile = V::kColumnRows * kLanes;
        for (std::ptrdiff_t c = 0; c < weight.columns; c += kDepth) {
            const Columns columns = {weight, c, min_of(kDepth, weight.columns - c), kDepth * weight.stride};
            std::ptrdiff_t r = first;
            for (; last - r >= kTile; r += kTile) {
                columns_some_rows<W, V::kColumnRows, true>(columns, r, kLanes, x, tokens, y + r - first, y_stride);
            }
            for (; last - r >= kLanes; r += kLanes) {
                columns_some_rows<W, 1, true>(columns, r, kLanes, x, tokens, y + r - first, y_stride);
            }
            if (r < last) columns_some_rows<W, 1, false>(columns, r, last - r, x, tokens, y + r - first, y_stride);
        }
    }

    // Columns start .. start + count of a transposed weight; prefetches `ahead` bytes further.
    struct Columns {
        const DenseRows& weight;
        std::ptrdiff_t start, count, ahead;
    };

    // R times sixteen rows from row r on; only `rows` of them unless `Whole`.
    template <class W, int R, bool Whole>
    static void columns_some_rows(const Columns& columns, std::ptrdiff_t r, std::ptrdiff_t rows,
                                  const float* const* x, std::ptrdiff_t tokens, float* y,
                                  std::ptrdiff_t y_stride) {
        std::ptrdiff_t t = 0;
        const auto run = [&](auto tile, std::ptrdiff_t count) {
            for (; tokens - t >= count; t += count) tile(columns, r, rows, t == 0, x + t, y + t * y_stride, y_stride);
        };
        run(columns_tile<W, R, 4, Whole>, 4);
        run(columns_tile<W, R, 3, Whole>, 3);
        run(columns_tile<W, R, 2, Whole>, 2);
        run(columns_tile<W, R, 1, Whole>, 1);
    }

    template <class W, int R, int T, bool Whole>
    static void columns_tile(const Columns& columns, std::ptrdiff_t row, std::ptrdiff_t rows, bool fetching,
                             const float* const* x, float* y, std::ptrdiff_t y_stride) {
        F sums[R][T];
        for (int r = 0; r < R; ++r) {
            for (int t = 0; t < T; ++t) {
                const float* from = y + t * y_stride + r * kLanes;
                sums[r][t] = Whole ? V::load(from) : Math::partial(from, rows);
            }
        }
        const std::uint8_t* from = columns.weight.data + columns.start * columns.weight.stride + W::kBytes * row;
        for (std::ptrdiff_t c = 0; c < columns.count; ++c, from += columns.weight.stride) {
            if (fetching) {
                for (int line = 0; line < W::kBytes * R * kLanes; line += 64) prefetch(from + columns.ahead + line);
            }
            F w[R];
            for (int r = 0; r < R; ++r) {
                const std::uint8_t* p = from + W::kBytes * r * kLanes;
                w[r] = Whole ? W::lanes(p) : Math::template lanes_partial<W>(p, rows);
            }
            for (int t = 0; t < T; ++t) {
                const F value = V::set(x[t][columns.start + c]);
                for (int r = 0; r < R; ++r) sums[r][t] = V::fma(value, w[r], sums[r][t]);
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int t = 0; t < T; ++t) {
                float* into = y + t * y_stride + r * kLanes;
                if constexpr (Whole) {
                    V::store(into, sums[r][t]);
                } else {
                    Math::store_partial(into, sums[r][t], rows);
                }
            }
        }
    }
};

}  // namespace
}  // namespace moe_surgery::cpu
