// Every kernel, over the sixteen lanes V of one instruction set. Included once by each set's file.
#include "bits.hpp"
#include "kernels.hpp"

namespace moe_surgery::cpu {
namespace {

// Weights are asked for at least this many bytes before they are used, and at least a tile of rows before:
// with less, rows of the same tile ask for what their neighbours have already read.
constexpr std::ptrdiff_t kAhead = 16384;

// Into the second cache: asked for the first, requests are too few at a time.
inline void fetch(const std::uint8_t* p) { __builtin_prefetch(p, 0, 2); }

inline std::ptrdiff_t smaller(std::ptrdiff_t a, std::ptrdiff_t b) { return a < b ? a : b; }

template <class V>
struct Over {
    using F = typename V::F;

    // e^x; x below -87 gives what -87 gives, and NaN stays one. Error within 2 units in the last place.
    static F exp(F x) {
        x = V::max(V::set(-87.0f), V::min(V::set(88.0f), x));
        const F n = V::round(V::mul(x, V::set(1.44269504f)));
        F r = V::fma(n, V::set(-0.693359375f), x);
        r = V::fma(n, V::set(2.12194440e-4f), r);
        F p = V::set(1.9875691500e-4f);
        p = V::fma(p, r, V::set(1.3981999507e-3f));
        p = V::fma(p, r, V::set(8.3334519073e-3f));
        p = V::fma(p, r, V::set(4.1665795894e-2f));
        p = V::fma(p, r, V::set(1.6666665459e-1f));
        p = V::fma(p, r, V::set(5.0000001201e-1f));
        p = V::add(V::fma(p, V::mul(r, r), r), V::set(1.0f));
        return V::mul(p, V::power_of_two(n));
    }

    static F partial(const float* p, std::ptrdiff_t count) {
        float held[kLanes] = {};
        __builtin_memcpy(held, p, static_cast<std::size_t>(count) * sizeof(float));
        return V::load(held);
    }

    static void store_partial(float* p, F f, std::ptrdiff_t count) {
        float held[kLanes];
        V::store(held, f);
        __builtin_memcpy(p, held, static_cast<std::size_t>(count) * sizeof(float));
    }

    // How the values of a dtype are read: sixteen from p on; 32, those at even places and those at odd ones.
    struct Bf16 {
        static constexpr std::ptrdiff_t kBytes = 2;
        static F lanes(const std::uint8_t* p) { return V::bf16(p); }
        static void pairs(const std::uint8_t* p, F& even, F& odd) { V::bf16_pairs(p, even, odd); }
    };
    struct F16 {
        static constexpr std::ptrdiff_t kBytes = 2;
        static F lanes(const std::uint8_t* p) { return V::f16(p); }
        static void pairs(const std::uint8_t* p, F& even, F& odd) { V::f16_pairs(p, even, odd); }
    };
    struct F32 {
        static constexpr std::ptrdiff_t kBytes = 4;
        static F lanes(const std::uint8_t* p) { return V::f32(p); }
        static void pairs(const std::uint8_t* p, F& even, F& odd) { V::f32_pairs(p, even, odd); }
    };

    // Calls `run` with the one for `dtype`.
    template <class Run>
    static void with(Dtype dtype, Run run) {
        switch (dtype) {
            case Dtype::bf16: return run(Bf16{});
            case Dtype::f16: return run(F16{});
            case Dtype::f32: return run(F32{});
        }
    }

    // `count` values, zeros after them.
    template <class W>
    static F lanes_partial(const std::uint8_t* p, std::ptrdiff_t count) {
        std::uint8_t held[W::kBytes * kLanes] = {};
        __builtin_memcpy(held, p, static_cast<std::size_t>(W::kBytes * count));
        return W::lanes(held);
    }

    // --- activations

    static void spread(const float* x, std::ptrdiff_t columns, float* out) {
        for (std::ptrdiff_t c = 0; c < groups_of(columns) * kGroup; ++c) {
            const std::ptrdiff_t place = c / kGroup * kGroup + c % 2 * kLanes + c % kGroup / 2;
            out[place] = c < columns ? x[c] : 0.0f;
        }
    }

    static void quantize(const float* x, std::ptrdiff_t columns, Span* spans) {
        for (std::ptrdiff_t s = 0; s < spans_of(columns); ++s) {
            for (std::ptrdiff_t lane = 0; lane < kLanes; ++lane) {
                const std::ptrdiff_t start = s * kSpan + block_of(lane) * kBlock;
                static constexpr float kNone[kBlock] = {};
                quantize_block(start < columns ? x + start : kNone, spans[s], lane);
            }
        }
    }

    static void quantize_block(const float* x, Span& span, std::ptrdiff_t lane) {
        float most = 0.0f;
        bool finite = true;
        for (int i = 0; i < kBlock; ++i) {
            const float size = __builtin_fabsf(x[i]);
            most = size > most ? size : most;
            finite &= size <= 3.402823466e38f;
        }
        // Below this the inverse would overflow; such values count as zeros.
        const bool zero = most < 1e-30f;
        const F up = V::set(zero ? 0.0f : kMostWhole / most);
        std::int16_t whole[kBlock];
        for (int i = 0; i < kBlock; i += kLanes) {
            V::store_rounded(whole + i, finite ? V::mul(V::load(x + i), up) : V::zero());
        }
        std::int32_t sum = 0;
        for (int i = 0; i < kBlock; ++i) {
            const int vector = i / 8 * 2 + i % 2, byte = static_cast<int>(4 * lane) + i % 8 / 2;
            const int low = static_cast<std::int8_t>(whole[i] & 255);
            span.low[vector][byte] = static_cast<std::int8_t>(low);
            span.high[vector][byte] = static_cast<std::int8_t>((whole[i] - low) / 256);
            sum += whole[i];
        }
        span.starts[lane] = -12 * sum;
        // Half, because weights are looked up as twice their value; NaN where the input had no number.
        const float down = zero ? 0.0f : most / kMostWhole * 0.5f;
        span.factors[lane] = finite ? down : from_bits(0x7fc00000u);
    }

    // --- dense rows

    // R rows from `w` on times T tokens.
    template <class W, int R, int T>
    static void dense_tile(const std::uint8_t* w, std::ptrdiff_t stride, std::ptrdiff_t columns, const Spread* x,
                          float* y, std::ptrdiff_t y_stride) {
        F sums[R][T];
        for (int r = 0; r < R; ++r) {
            for (int t = 0; t < T; ++t) sums[r][t] = V::zero();
        }
        const std::ptrdiff_t full = columns / kGroup, ahead = R * stride > kAhead ? R * stride : kAhead;
        for (std::ptrdiff_t g = 0; g < full; ++g) {
            multiply<W, R, T>(x, g, sums, [&](int r) {
                const std::uint8_t* from = w + r * stride + W::kBytes * kGroup * g;
                for (int line = 0; line < W::kBytes * kGroup; line += 64) fetch(from + ahead + line);
                return from;
            });
        }
        if (full * kGroup < columns) {
            std::uint8_t held[R][W::kBytes * kGroup] = {};
            const std::ptrdiff_t start = W::kBytes * kGroup * full;
            for (int r = 0; r < R; ++r) {
                __builtin_memcpy(held[r], w + r * stride + start, static_cast<std::size_t>(W::kBytes * columns - start));
            }
            multiply<W, R, T>(x, full, sums, [&](int r) { return held[r]; });
        }
        for (int r = 0; r < R; ++r) {
            for (int t = 0; t < T; ++t) y[t * y_stride + r] = V::sum(sums[r][t]);
        }
    }

    // `at(r)` is where the group g of row r lies.
    template <class W, int R, int T, class At>
    static inline void multiply(const Spread* x, std::ptrdiff_t g, F (&sums)[R][T], At at) {
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
    static void dense_some_rows(const std::uint8_t* w, const DenseRows& weight, const Spread* x,
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

    static void dense_rows(const DenseRows& weight, std::ptrdiff_t first, std::ptrdiff_t last, const Spread* x,
                           std::ptrdiff_t tokens, float* y, std::ptrdiff_t y_stride) {
        with(weight.dtype, [&](auto dtype) {
            using W = decltype(dtype);
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

    // --- MXFP4 rows

    // R rows from `row` on times T tokens.
    template <int R, int T>
    static void mxfp4_tile(const Mxfp4Rows& weight, std::ptrdiff_t row, const Quantized* x, float* y,
                           std::ptrdiff_t y_stride) {
        const std::uint8_t* blocks = weight.blocks + row * weight.block_stride;
        const std::uint8_t* scales = weight.scales + row * weight.scale_stride;
        const std::ptrdiff_t held = weight.columns / kBlock, full = held / kLanes;
        F sums[R][T];
        for (int r = 0; r < R; ++r) {
            for (int t = 0; t < T; ++t) sums[r][t] = V::zero();
        }
        for (std::ptrdiff_t s = 0; s < full; ++s) {
            multiply_span<R, T>(x, s, sums, [&](int r, typename V::Packed& packed, F& scale) {
                const std::uint8_t* from = blocks + r * weight.block_stride + s * kSpanBytes;
                for (int line = 0; line < kSpanBytes; line += 64) fetch(from + kAhead + line);
                packed = V::packed(from);
                scale = V::scales(scales + r * weight.scale_stride + s * kLanes);
            });
        }
        if (full * kLanes < held) {
            const std::ptrdiff_t count = held - full * kLanes;
            multiply_span<R, T>(x, full, sums, [&](int r, typename V::Packed& packed, F& scale) {
                const std::uint8_t* from = blocks + r * weight.block_stride + full * kSpanBytes;
                for (std::ptrdiff_t line = 0; line < count * kBlockBytes; line += 64) fetch(from + kAhead + line);
                std::uint8_t some[kLanes] = {};
                __builtin_memcpy(some, scales + r * weight.scale_stride + full * kLanes, static_cast<std::size_t>(count));
                packed = V::packed_of(from, static_cast<int>(count));
                scale = V::scales(some);
            });
        }
        for (int r = 0; r < R; ++r) {
            for (int t = 0; t < T; ++t) y[t * y_stride + r] = V::sum(sums[r][t]);
        }
    }

    // `at(r, packed, scale)` gives span s of row r.
    template <int R, int T, class At>
    static inline void multiply_span(const Quantized* x, std::ptrdiff_t s, F (&sums)[R][T], At at) {
        typename V::Packed packed[R];
        F scales[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) at(r, packed[r], scales[r]);
        const Span* spans[T];
        for (int t = 0; t < T; ++t) spans[t] = x[t] + s;
        typename V::I whole[R][T];
        V::template multiply<R, T>(packed, spans, whole);
        for (int t = 0; t < T; ++t) {
            const F factors = V::load(spans[t]->factors);
            for (int r = 0; r < R; ++r) {
                sums[r][t] = V::fma(V::to_float(whole[r][t]), V::mul(factors, scales[r]), sums[r][t]);
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

    static void mxfp4_rows(const Mxfp4Rows& weight, std::ptrdiff_t first, std::ptrdiff_t last,
                           const Quantized* x, std::ptrdiff_t tokens, float* y, std::ptrdiff_t y_stride) {
        std::ptrdiff_t r = first;
        for (; last - r >= V::kPackedRows; r += V::kPackedRows) {
            mxfp4_some_rows<V::kPackedRows>(weight, r, x, tokens, y + r - first, y_stride);
        }
        for (; r < last; ++r) mxfp4_some_rows<1>(weight, r, x, tokens, y + r - first, y_stride);
    }

    // --- dense columns

    static void dense_transposed(const DenseRows& weight, std::ptrdiff_t first, std::ptrdiff_t last,
                                 const float* const* x, std::ptrdiff_t tokens, float* y,
                                 std::ptrdiff_t y_stride) {
        with(weight.dtype, [&](auto dtype) {
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
            const Columns columns = {weight, c, smaller(kDepth, weight.columns - c), kDepth * weight.stride};
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

    // Columns start .. start + count of a transposed weight; those so many bytes further on are next.
    struct Columns {
        const DenseRows& weight;
        std::ptrdiff_t start, count, ahead;
    };

    // Sixteen rows R times from row r on; only `rows` of them where they are not `Whole`.
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
                sums[r][t] = Whole ? V::load(from) : partial(from, rows);
            }
        }
        const std::uint8_t* from = columns.weight.data + columns.start * columns.weight.stride + W::kBytes * row;
        for (std::ptrdiff_t c = 0; c < columns.count; ++c, from += columns.weight.stride) {
            if (fetching) {
                for (int line = 0; line < W::kBytes * R * kLanes; line += 64) fetch(from + columns.ahead + line);
            }
            F w[R];
            for (int r = 0; r < R; ++r) {
                const std::uint8_t* p = from + W::kBytes * r * kLanes;
                w[r] = Whole ? W::lanes(p) : lanes_partial<W>(p, rows);
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
                    store_partial(into, sums[r][t], rows);
                }
            }
        }
    }

    // --- between products

    static void swiglu(const float* h, std::ptrdiff_t units, float limit, float alpha, float* z) {
        const F one = V::set(1.0f);
        for (std::ptrdiff_t i = 0; i < units; i += kLanes) {
            const std::ptrdiff_t count = smaller(kLanes, units - i);
            float gates[kLanes] = {}, ups[kLanes] = {};
            for (std::ptrdiff_t j = 0; j < count; ++j) {
                gates[j] = h[2 * (i + j)];
                ups[j] = h[2 * (i + j) + 1];
            }
            // The value last, so that NaN stays NaN.
            const F gate = V::min(V::set(limit), V::load(gates));
            const F up = V::max(V::set(-limit), V::min(V::set(limit), V::load(ups)));
            const F fading = exp(V::mul(V::set(-alpha), gate));
            const F value = V::mul(V::add(up, one), V::div(gate, V::add(one, fading)));
            store_partial(z + i, value, count);
        }
    }

    static void rms_norm(const float* x, const Values& weight, std::ptrdiff_t columns, float eps, float* y) {
        with(weight.dtype, [&](auto dtype) { normed<decltype(dtype)>(x, weight.data, columns, eps, y); });
    }

    template <class W>
    static void normed(const float* x, const std::uint8_t* weight, std::ptrdiff_t columns, float eps, float* y) {
        F squares = V::zero();
        for (std::ptrdiff_t c = 0; c < columns; c += kLanes) {
            const std::ptrdiff_t count = smaller(kLanes, columns - c);
            const F value = count == kLanes ? V::load(x + c) : partial(x + c, count);
            squares = V::fma(value, value, squares);
        }
        const float mean = V::sum(squares) / static_cast<float>(columns);
        const F scale = V::set(1.0f / __builtin_sqrtf(mean + eps));
        for (std::ptrdiff_t c = 0; c < columns; c += kLanes) {
            const std::ptrdiff_t count = smaller(kLanes, columns - c);
            const bool all = count == kLanes;
            const F value = V::mul(all ? V::load(x + c) : partial(x + c, count), scale);
            const std::uint8_t* p = weight + W::kBytes * c;
            const F loud = all ? W::lanes(p) : lanes_partial<W>(p, count);
            store_partial(y + c, V::mul(value, loud), count);
        }
    }

    // --- attention

    // Sixteen values of a head from value d on, of float32 or BF16; zeros after the head's last.
    template <bool Wide>
    static inline F head_part(const std::uint8_t* head, std::ptrdiff_t d, std::ptrdiff_t head_dim) {
        const std::uint8_t* from = head + d * (Wide ? 4 : 2);
        const std::ptrdiff_t count = smaller(kLanes, head_dim - d);
        if constexpr (Wide) {
            const float* floats = reinterpret_cast<const float*>(from);
            return count == kLanes ? V::load(floats) : partial(floats, count);
        } else {
            return count == kLanes ? V::bf16(from) : lanes_partial<Bf16>(from, count);
        }
    }

    // Below: H heads together; D: a head's sixteens where they are known when compiling, else 0.

    // scores[h * stride + i] of key i, and some after the last one.
    template <bool Wide, int D, int H>
    static void scores_of(const float* q, std::ptrdiff_t q_stride, const AttentionSpan& span, float* scores,
                          std::ptrdiff_t stride) {
        const std::ptrdiff_t parts = D ? D : (span.head_dim + kLanes - 1) / kLanes;
        for (std::ptrdiff_t i = 0; i < span.count; i += 4) {
            const std::uint8_t* keys[4];
            F held[4][D ? D : 1];
            for (int k = 0; k < 4; ++k) {
                keys[k] = span.keys + span.slots[smaller(i + k, span.count - 1)] * span.key_stride;
                for (int d = 0; d < D; ++d) held[k][d] = head_part<Wide>(keys[k], d * kLanes, D * kLanes);
            }
            for (int h = 0; h < H; ++h) {
                const std::uint8_t* query = reinterpret_cast<const std::uint8_t*>(q + h * q_stride);
                F sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
                for (std::ptrdiff_t d = 0; d < parts; ++d) {
                    const F value = head_part<true>(query, d * kLanes, D ? D * kLanes : span.head_dim);
                    for (int k = 0; k < 4; ++k) {
                        const F key = D ? held[k][d] : head_part<Wide>(keys[k], d * kLanes, span.head_dim);
                        sums[k] = V::fma(value, key, sums[k]);
                    }
                }
                V::sum_four(sums, scores + h * stride + i);
            }
        }
    }

    // Scores to weights; one over their sum.
    static float soften(float* scores, std::ptrdiff_t count, std::ptrdiff_t padded, float sink, F factor) {
        for (std::ptrdiff_t i = count; i < padded; ++i) scores[i] = -__builtin_inff();
        F tops = V::set(sink);
        for (std::ptrdiff_t i = 0; i < padded; i += kLanes) {
            const F scaled = V::mul(V::load(scores + i), factor);
            V::store(scores + i, scaled);
            tops = V::max(tops, scaled);
        }
        float held[kLanes], top = sink;
        V::store(held, tops);
        for (float value : held) top = value > top ? value : top;
        F totals = V::zero();
        for (std::ptrdiff_t i = 0; i < padded; i += kLanes) {
            V::store(held, exp(V::sub(V::load(scores + i), V::set(top))));
            for (std::ptrdiff_t j = smaller(kLanes, count - i); j < kLanes; ++j) held[j] = 0.0f;
            const F kept = V::load(held);
            V::store(scores + i, kept);
            totals = V::add(totals, kept);
        }
        V::store(held, exp(V::set(sink - top)));
        return 1.0f / (V::sum(totals) + held[0]);
    }

    template <bool Wide, int D, int H>
    static void mix(const float* weights, std::ptrdiff_t stride, const float* shares,
                    const AttentionSpan& span, float* out) {
        constexpr int kAtOnce = D ? D : 1;
        const std::ptrdiff_t head_dim = D ? D * kLanes : span.head_dim;
        for (std::ptrdiff_t d = 0; d < head_dim; d += kAtOnce * kLanes) {
            F mixed[H][kAtOnce];
            for (int h = 0; h < H; ++h) {
                for (int j = 0; j < kAtOnce; ++j) mixed[h][j] = V::zero();
            }
            for (std::ptrdiff_t i = 0; i < span.count; ++i) {
                const std::uint8_t* value = span.values + span.slots[i] * span.value_stride;
                F held[kAtOnce];
                for (int j = 0; j < kAtOnce; ++j) held[j] = head_part<Wide>(value, d + j * kLanes, head_dim);
                for (int h = 0; h < H; ++h) {
                    const F weight = V::set(weights[h * stride + i]);
                    for (int j = 0; j < kAtOnce; ++j) mixed[h][j] = V::fma(weight, held[j], mixed[h][j]);
                }
            }
            for (int h = 0; h < H; ++h) {
                for (int j = 0; j < kAtOnce; ++j) {
                    const std::ptrdiff_t start = d + j * kLanes;
                    store_partial(out + h * head_dim + start, V::mul(mixed[h][j], V::set(shares[h])),
                                  smaller(kLanes, head_dim - start));
                }
            }
        }
    }

    template <bool Wide, int D, int H>
    static void attend_some(const float* q, std::ptrdiff_t q_stride, const float* sinks,
                            const AttentionSpan& span, float* scores, float* out) {
        const F factor = V::set(1.0f / __builtin_sqrtf(static_cast<float>(span.head_dim)));
        const std::ptrdiff_t padded = (span.count + kLanes - 1) / kLanes * kLanes;
        scores_of<Wide, D, H>(q, q_stride, span, scores, padded);
        float shares[H];
        for (int h = 0; h < H; ++h) shares[h] = soften(scores + h * padded, span.count, padded, sinks[h], factor);
        constexpr int kStep = H < V::kMixedHeads ? H : V::kMixedHeads;
        for (int h = 0; h < H; h += kStep) {
            mix<Wide, D, kStep>(scores + h * padded, padded, shares + h, span, out + h * span.head_dim);
        }
    }

    template <bool Wide, int D>
    static void attend_heads(const float* q, std::ptrdiff_t q_stride, const float* sinks, std::ptrdiff_t heads,
                             const AttentionSpan& span, float* scores, float* out) {
        std::ptrdiff_t h = 0;
        const auto run = [&](auto some, std::ptrdiff_t count) {
            for (; heads - h >= count; h += count) {
                some(q + h * q_stride, q_stride, sinks + h, span, scores, out + h * span.head_dim);
            }
        };
        run(attend_some<Wide, D, kHeadsAtOnce>, kHeadsAtOnce);
        run(attend_some<Wide, D, 1>, 1);
    }

    static void attend(const float* q, std::ptrdiff_t q_stride, const float* sinks, std::ptrdiff_t heads,
                       const AttentionSpan& span, float* scores, float* out) {
        const auto over = span.head_dim == 4 * kLanes ? (span.wide ? attend_heads<true, 4> : attend_heads<false, 4>)
                                                      : (span.wide ? attend_heads<true, 0> : attend_heads<false, 0>);
        over(q, q_stride, sinks, heads, span, scores, out);
    }

    static constexpr Kernels set(const char* name) {
        return {name,   spread,   quantize, dense_rows, mxfp4_rows, dense_transposed,
                swiglu, rms_norm, attend};
    }
};

}  // namespace
}  // namespace moe_surgery::cpu
