// Attention of a few query heads over the keys of one key-value head.
#pragma once

#include "lane_math.inl"

namespace moe_surgery::cpu {
namespace {

template <class V>
struct AttentionOver {
    using F = typename V::F;
    using Math = LaneMath<V>;

    // Sixteen values of a head from value d on, of float32 or BF16; zeros after the head's last.
    template <bool Wide>
    static inline F head_part(const std::uint8_t* head, std::ptrdiff_t d, std::ptrdiff_t head_dim) {
        const std::uint8_t* from = head + d * (Wide ? 4 : 2);
        const std::ptrdiff_t count = smaller(kLanes, head_dim - d);
        if constexpr (Wide) {
            const float* floats = reinterpret_cast<const float*>(from);
            return count == kLanes ? V::load(floats) : Math::partial(floats, count);
        } else {
            return count == kLanes ? V::bf16(from) : Math::template lanes_partial<typename Math::Bf16>(from, count);
        }
    }

    // Below: H heads together; D: a head's sixteens where they are known when compiling, else 0.

    // scores[h * stride + i] of key i, and some after the last one.
    template <bool Wide, int D, int H>
    static void scores_of(const float* q, std::ptrdiff_t q_stride, const KeyRange& span, float* scores,
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
    static float softmax(float* scores, std::ptrdiff_t count, std::ptrdiff_t padded, float sink, F factor) {
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
            V::store(held, Math::exp(V::sub(V::load(scores + i), V::set(top))));
            for (std::ptrdiff_t j = smaller(kLanes, count - i); j < kLanes; ++j) held[j] = 0.0f;
            const F kept = V::load(held);
            V::store(scores + i, kept);
            totals = V::add(totals, kept);
        }
        V::store(held, Math::exp(V::set(sink - top)));
        return 1.0f / (V::sum(totals) + held[0]);
    }

    template <bool Wide, int D, int H>
    static void weighted_values(const float* weights, std::ptrdiff_t stride, const float* shares,
                    const KeyRange& span, float* out) {
        constexpr int kAtOnce = D ? D : 1;
        const std::ptrdiff_t head_dim = D ? D * kLanes : span.head_dim;
        for (std::ptrdiff_t d = 0; d < head_dim; d += kAtOnce * kLanes) {
            F acc[H][kAtOnce];
            for (int h = 0; h < H; ++h) {
                for (int j = 0; j < kAtOnce; ++j) acc[h][j] = V::zero();
            }
            for (std::ptrdiff_t i = 0; i < span.count; ++i) {
                const std::uint8_t* value = span.values + span.slots[i] * span.value_stride;
                F held[kAtOnce];
                for (int j = 0; j < kAtOnce; ++j) held[j] = head_part<Wide>(value, d + j * kLanes, head_dim);
                for (int h = 0; h < H; ++h) {
                    const F weight = V::set(weights[h * stride + i]);
                    for (int j = 0; j < kAtOnce; ++j) acc[h][j] = V::fma(weight, held[j], acc[h][j]);
                }
            }
            for (int h = 0; h < H; ++h) {
                for (int j = 0; j < kAtOnce; ++j) {
                    const std::ptrdiff_t start = d + j * kLanes;
                    Math::store_partial(out + h * head_dim + start, V::mul(acc[h][j], V::set(shares[h])),
                                  smaller(kLanes, head_dim - start));
                }
            }
        }
    }

    template <bool Wide, int D, int H>
    static void attention_some(const float* q, std::ptrdiff_t q_stride, const float* sinks,
                            const KeyRange& span, float* scores, float* out) {
        const F factor = V::set(1.0f / __builtin_sqrtf(static_cast<float>(span.head_dim)));
        const std::ptrdiff_t padded = (span.count + kLanes - 1) / kLanes * kLanes;
        scores_of<Wide, D, H>(q, q_stride, span, scores, padded);
        float shares[H];
        for (int h = 0; h < H; ++h) shares[h] = softmax(scores + h * padded, span.count, padded, sinks[h], factor);
        constexpr int kStep = H < V::kValueHeads ? H : V::kValueHeads;
        for (int h = 0; h < H; h += kStep) {
            weighted_values<Wide, D, kStep>(scores + h * padded, padded, shares + h, span, out + h * span.head_dim);
        }
    }

    template <bool Wide, int D>
    static void attention_heads(const float* q, std::ptrdiff_t q_stride, const float* sinks, std::ptrdiff_t heads,
                             const KeyRange& span, float* scores, float* out) {
        std::ptrdiff_t h = 0;
        const auto run = [&](auto some, std::ptrdiff_t count) {
            for (; heads - h >= count; h += count) {
                some(q + h * q_stride, q_stride, sinks + h, span, scores, out + h * span.head_dim);
            }
        };
        run(attention_some<Wide, D, kHeadsAtOnce>, kHeadsAtOnce);
        run(attention_some<Wide, D, 1>, 1);
    }

    static void attention(const float* q, std::ptrdiff_t q_stride, const float* sinks, std::ptrdiff_t heads,
                       const KeyRange& span, float* scores, float* out) {
        const auto over = span.head_dim == 4 * kLanes ? (span.wide ? attention_heads<true, 4> : attention_heads<false, 4>)
                                                      : (span.wide ? attention_heads<true, 0> : attention_heads<false, 0>);
        over(q, q_stride, sinks, heads, span, scores, out);
    }
};

}  // namespace
}  // namespace moe_surgery::cpu
