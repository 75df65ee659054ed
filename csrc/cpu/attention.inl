// Attention of a few query heads over the keys of one key-value head.
#pragma once

#include "lane_math.inl"

namespace moe_surgery::cpu {
namespace {

template <class V>
struct AttentionKernel {
    using F = typename V::F;
    using Math = LaneMath<V>;

    // Sixteen values of a head from value d on, of float32 or BF16; zeros after the head's last.
    template <bool IsF32>
    static inline F head_part(const std::uint8_t* head, std::ptrdiff_t d, std::ptrdiff_t head_dim) {
        const std::uint8_t* from = head + d * (IsF32 ? 4 : 2);
        const std::ptrdiff_t count = min_of(kLanes, head_dim - d);
        if constexpr (IsF32) {
            const float* floats = reinterpret_cast<const float*>(from);
            return count == kLanes ? V::load(floats) : Math::partial(floats, count);
        } else {
            return count == kLanes ? V::bf16(from) : Math::template lanes_partial<typename Math::Bf16>(from, count);
        }
    }

    // Below, H heads are processed together; D is head_dim / 16 if known at compile time, else 0.

    // scores[h * stride + i] of key i; up to three more are written after the last one.
    template <bool IsF32, int D, int H>
    static void scores_of(const float* q, std::ptrdiff_t q_stride, const KeyRange& range, float* scores,
                          std::ptrdiff_t stride) {
        const std::ptrdiff_t parts = D ? D : (range.head_dim + kLanes - 1) / kLanes;
        for (std::ptrdiff_t i = 0; i < range.count; i += 4) {
            const std::uint8_t* keys[4];
            F key_parts[4][D ? D : 1];
            for (int k = 0; k < 4; ++k) {
                keys[k] = range.keys + range.slots[min_of(i + k, range.count - 1)] * range.key_stride;
                for (int d = 0; d < D; ++d) key_parts[k][d] = head_part<IsF32>(keys[k], d * kLanes, D * kLanes);
            }
            for (int h = 0; h < H; ++h) {
                const std::uint8_t* query = reinterpret_cast<const std::uint8_t*>(q + h * q_stride);
                F sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
                for (std::ptrdiff_t d = 0; d < parts; ++d) {
                    const F value = head_part<true>(query, d * kLanes, D ? D * kLanes : range.head_dim);
                    for (int k = 0; k < 4; ++k) {
                        const F key = D ? key_parts[k][d] : head_part<IsF32>(keys[k], d * kLanes, range.head_dim);
                        sums[k] = V::fma(value, key, sums[k]);
                    }
                }
                V::sum_four(sums, scores + h * stride + i);
            }
        }
    }

    // Scores to unnormalised weights; returns 1 / their sum, sink included.
    static float softmax(float* scores, std::ptrdiff_t count, std::ptrdiff_t padded, float sink, F factor) {
        for (std::ptrdiff_t i = count; i < padded; ++i) scores[i] = -__builtin_inff();
        F maxima = V::set(sink);
        for (std::ptrdiff_t i = 0; i < padded; i += kLanes) {
            const F scaled = V::mul(V::load(scores + i), factor);
            V::store(scores + i, scaled);
            maxima = V::max(maxima, scaled);
        }
        float lanes[kLanes], max_score = sink;
        V::store(lanes, maxima);
        for (float value : lanes) max_score = value > max_score ? value : max_score;
        F totals = V::zero();
        const std::ptrdiff_t full = count / kLanes * kLanes;
        for (std::ptrdiff_t i = 0; i < full; i += kLanes) {
            const F weights = Math::exp(V::sub(V::load(scores + i), V::set(max_score)));
            V::store(scores + i, weights);
            totals = V::add(totals, weights);
        }
        if (full < count) {
            V::store(lanes, Math::exp(V::sub(V::load(scores + full), V::set(max_score))));
            for (std::ptrdiff_t j = count - full; j < kLanes; ++j) lanes[j] = 0.0f;
            const F weights = V::load(lanes);
            V::store(scores + full, weights);
            totals = V::add(totals, weights);
        }
        V::store(lanes, Math::exp(V::set(sink - max_score)));
        return 1.0f / (V::sum(totals) + lanes[0]);
    }

    template <bool IsF32, int D, int H>
    static void weighted_values(const float* weights, std::ptrdiff_t stride, const float* inverse_sums,
                    const KeyRange& range, float* out) {
        constexpr int kAtOnce = D ? D : 1;
        const std::ptrdiff_t head_dim = D ? D * kLanes : range.head_dim;
        for (std::ptrdiff_t d = 0; d < head_dim; d += kAtOnce * kLanes) {
            F acc[H][kAtOnce];
            for (int h = 0; h < H; ++h) {
                for (int j = 0; j < kAtOnce; ++j) acc[h][j] = V::zero();
            }
            add_values<IsF32, H>(weights, stride, range, d, head_dim, acc);
            for (int h = 0; h < H; ++h) {
                for (int j = 0; j < kAtOnce; ++j) {
                    const std::ptrdiff_t start = d + j * kLanes;
                    Math::store_partial(out + h * head_dim + start, V::mul(acc[h][j], V::set(inverse_sums[h])),
                                  min_of(kLanes, head_dim - start));
                }
            }
        }
    }

    // Adds the range's values from value d of a head on, times weights[h * stride + key].
    template <bool IsF32, int H, int N>
    static inline void add_values(const float* weights, std::ptrdiff_t stride, const KeyRange& range, std::ptrdiff_t d,
                                  std::ptrdiff_t head_dim, F (&acc)[H][N]) {
        for (std::ptrdiff_t i = 0; i < range.count; ++i) {
            const std::uint8_t* value = range.values + range.slots[i] * range.value_stride;
            F value_parts[N];
            for (int j = 0; j < N; ++j) value_parts[j] = head_part<IsF32>(value, d + j * kLanes, head_dim);
            for (int h = 0; h < H; ++h) {
                const F weight = V::set(weights[h * stride + i]);
                for (int j = 0; j < N; ++j) acc[h][j] = V::fma(weight, value_parts[j], acc[h][j]);
            }
        }
    }

    template <bool IsF32, int D, int H>
    static void attention_some(const float* q, std::ptrdiff_t q_stride, const float* sinks,
                            const KeyRange& range, float* scores, float* out) {
        const F factor = V::set(1.0f / __builtin_sqrtf(static_cast<float>(range.head_dim)));
        const std::ptrdiff_t padded = (range.count + kLanes - 1) / kLanes * kLanes;
        scores_of<IsF32, D, H>(q, q_stride, range, scores, padded);
        float inverse_sums[H];
        for (int h = 0; h < H; ++h) inverse_sums[h] = softmax(scores + h * padded, range.count, padded, sinks[h], factor);
        constexpr int kStep = H < V::kValueHeads ? H : V::kValueHeads;
        for (int h = 0; h < H; h += kStep) {
            weighted_values<IsF32, D, kStep>(scores + h * padded, padded, inverse_sums + h, range, out + h * range.head_dim);
        }
    }

    template <bool IsF32, int D>
    static void attention_heads(const float* q, std::ptrdiff_t q_stride, const float* sinks, std::ptrdiff_t heads,
                             const KeyRange& range, float* scores, float* out) {
        std::ptrdiff_t h = 0;
        const auto run = [&](auto some, std::ptrdiff_t count) {
            for (; heads - h >= count; h += count) {
                some(q + h * q_stride, q_stride, sinks + h, range, scores, out + h * range.head_dim);
            }
        };
        run(attention_some<IsF32, D, kHeadsAtOnce>, kHeadsAtOnce);
        run(attention_some<IsF32, D, 1>, 1);
    }

    static void attention(const float* q, std::ptrdiff_t q_stride, const float* sinks, std::ptrdiff_t heads,
                       const KeyRange& range, float* scores, float* out) {
        const auto over = range.head_dim == 4 * kLanes ? (range.is_f32 ? attention_heads<true, 4> : attention_heads<false, 4>)
                                                      : (range.is_f32 ? attention_heads<true, 0> : attention_heads<false, 0>);
        over(q, q_stride, sinks, heads, range, scores, out);
    }
};

}  // namespace
}  // namespace moe_surgery::cpu
